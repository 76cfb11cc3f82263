package awss3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/storagetest"
	"github.com/keyagent/keyagent/test/sim/emulator"
	"github.com/keyagent/keyagent/test/sim/faultproxy"
)

// trick sees each request before the service does, and says whether it has
// answered it.
type trick func(w http.ResponseWriter, r *http.Request, service http.Handler) bool

// service is gofakes3 with a trick in front of it.
type service struct {
	*httptest.Server
	trick atomic.Pointer[trick]
}

func newService(t *testing.T) *service {
	t.Helper()
	s := &service{}
	fake := gofakes3.New(s3mem.New()).Server()
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f := s.trick.Load(); f == nil || !(*f)(w, r, fake) {
			fake.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *service) plays(f trick) { s.trick.Store(&f) }

func (s *service) options() Options {
	return Options{
		Bucket: "records", Prefix: "a/b", Region: "eu-central-1", Endpoint: s.URL, CreateBucket: true,
		Credentials: credentials.NewStaticCredentialsProvider("hunter2-id", "hunter2-key", ""),
	}
}

func (s *service) open(t *testing.T) *Storage {
	t.Helper()
	st, err := New(t.Context(), s.options())
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// versions turns versioning on, as the bucket's owner.
func (s *service) versions(t *testing.T) func() func(string) int {
	return func() func(string) int {
		s.open(t) // makes the bucket
		owner := s3.New(s3.Options{Region: "eu-central-1", BaseEndpoint: &s.URL, UsePathStyle: true, Credentials: s.options().Credentials})
		if _, err := owner.PutBucketVersioning(t.Context(), &s3.PutBucketVersioningInput{Bucket: aws.String("records"), VersioningConfiguration: &types.VersioningConfiguration{Status: types.BucketVersioningStatusEnabled}}); err != nil {
			t.Fatal(err)
		}
		return func(name string) (n int) {
			out, err := owner.ListObjectVersions(t.Context(), &s3.ListObjectVersionsInput{Bucket: aws.String("records")})
			if err != nil {
				t.Fatal(err)
			}
			for _, v := range out.Versions {
				if (*v.Key == name || strings.HasSuffix(*v.Key, "/"+name)) && !*v.IsLatest {
					n++
				}
			}
			return n
		}
	}
}

func refusal(w http.ResponseWriter, status int, code string) bool {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	fmt.Fprintf(w, "<Error><Code>%s</Code><Message>in the words of the cloud</Message></Error>", code)
	return true
}

func TestTheSuiteOfStorageHolds(t *testing.T) {
	for _, prefix := range []string{"", "some/where"} {
		t.Run("with the prefix "+prefix, func(t *testing.T) {
			storagetest.Run(t, func(t *testing.T) storagetest.Bed {
				s := newService(t)
				return storagetest.Bed{Open: func() storage.Storage {
					opts := s.options()
					opts.Prefix = prefix
					if prefix != "" {
						opts.Tags = storage.Tags{"team": "disks"}
					}
					st, err := New(t.Context(), opts)
					if err != nil {
						t.Fatal(err)
					}
					return st
				}, Versions: s.versions(t)}
			})
		})
	}
}

// TestTheSuiteOfStorageHoldsOverTheWire runs against a server that is not of this
// process, and checks signatures.
func TestTheSuiteOfStorageHoldsOverTheWire(t *testing.T) {
	server := emulator.S3(t)
	secret := credentials.NewStaticCredentialsProvider(server.AccessKey, server.Secret, "")
	operator := s3.New(s3.Options{Region: "us-east-1", BaseEndpoint: &server.URL, UsePathStyle: true, Credentials: secret})
	var buckets atomic.Int32
	storagetest.Run(t, func(t *testing.T) storagetest.Bed {
		proxy := faultproxy.New(t, server.URL)
		bucket := fmt.Sprintf("records-%d", buckets.Add(1))
		opts := Options{Bucket: bucket, Prefix: "some/where", Region: "us-east-1", Endpoint: proxy.URL, Credentials: secret, CreateBucket: true}
		if _, err := New(t.Context(), opts); err != nil {
			t.Fatal(err)
		}
		opts.CreateBucket = false
		key := func(name string) *string { return aws.String(opts.Prefix + "/" + name) }
		return storagetest.Bed{
			Folders: true, // objects are files
			Names:   2500, // on disk
			Open: func() storage.Storage {
				st, err := New(t.Context(), opts)
				if err != nil {
					t.Fatal(err)
				}
				return st
			},
			Stall: proxy.Stall,
			LoseAnswer: func() {
				proxy.LoseAnswer(func(r *http.Request) bool { return r.Method == http.MethodPut })
			},
			Remove: func() {
				if _, err := operator.DeleteObject(t.Context(), &s3.DeleteObjectInput{Bucket: &bucket, Key: key("a")}); err != nil {
					t.Fatal(err)
				}
				if _, err := operator.DeleteBucket(t.Context(), &s3.DeleteBucketInput{Bucket: &bucket}); err != nil {
					t.Fatal(err)
				}
			},
			Plant: func(name string, data []byte) {
				if _, err := operator.PutObject(t.Context(), &s3.PutObjectInput{Bucket: &bucket, Key: key(name), Body: bytes.NewReader(data)}); err != nil {
					t.Fatal(err)
				}
			},
		}
	})

	opts := Options{Bucket: "records-1", Region: "us-east-1", Endpoint: server.URL}
	opts.Credentials = credentials.NewStaticCredentialsProvider(server.AccessKey, "hunter2", "")
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrCredentials) || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("a wrong secret: %v", err)
	}
}

func TestCredentialsThatAreNoneAreNamed(t *testing.T) {
	s := newService(t)
	lost := &smithy.OperationError{ServiceID: "STS", OperationName: "AssumeRoleWithWebIdentity", Err: errors.New("connection refused")}
	for name, c := range map[string]struct{ err, want error }{
		"there are none":                {errors.New("no provider has any"), storage.ErrCredentials},
		"this is no instance":           {&smithy.OperationError{ServiceID: "ec2imds", Err: errors.New("timeout")}, storage.ErrCredentials},
		"their service does not answer": {lost, storage.ErrUnavailable},
	} {
		opts := s.options()
		opts.Attempts = 1
		opts.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return aws.Credentials{}, c.err })
		_, err := New(t.Context(), opts)
		for _, class := range []error{storage.ErrCredentials, storage.ErrUnavailable} {
			if errors.Is(err, class) != (class == c.want) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func TestWhatTheServiceAnswersIsClassed(t *testing.T) {
	write := func(ctx context.Context, s *Storage) error {
		_, err := s.Put(ctx, "x", []byte("new"), storage.Absent)
		return err
	}
	read := func(ctx context.Context, s *Storage) error {
		_, _, err := s.Get(ctx, "x")
		return err
	}
	list := func(ctx context.Context, s *Storage) error {
		_, err := s.List(ctx, "", "", 10)
		return err
	}
	answer := func(status int, code string) trick {
		return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool { return refusal(w, status, code) }
	}
	onPut := func(f trick) trick {
		return func(w http.ResponseWriter, r *http.Request, h http.Handler) bool {
			return r.Method == http.MethodPut && f(w, r, h)
		}
	}
	send := func(body string) trick {
		return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
			w.Header().Set("ETag", `"e"`)
			fmt.Fprint(w, body)
			return true
		}
	}
	for name, c := range map[string]struct {
		trick trick
		call  func(context.Context, *Storage) error
		want  error
		text  string
	}{
		"a condition that does not hold is a conflict":          {onPut(answer(412, "PreconditionFailed")), write, storage.ErrConflict, ""},
		"two writes at once are a conflict":                     {onPut(answer(409, "ConditionalRequestConflict")), write, storage.ErrConflict, ""},
		"a forbidden write names the permission":                {answer(403, "AccessDenied"), write, storage.ErrDenied, "s3:PutObject"},
		"a forbidden read names both permissions":               {answer(403, "AccessDenied"), read, storage.ErrDenied, "s3:ListBucket"},
		"a forbidden list names the permission":                 {answer(403, "AccessDenied"), list, storage.ErrDenied, "s3:ListBucket"},
		"a bucket that is gone is not an object that is absent": {answer(404, "NoSuchBucket"), read, storage.ErrNoBucket, ""},
		"404 without a reason is not an object that is absent":  {answer(404, "NotFound"), read, nil, "in the words"},
		"a request that the service does not understand":        {answer(400, "InvalidRequest"), write, nil, "InvalidRequest"},
		"a service that fails leaves open what is there":        {answer(500, "InternalError"), read, storage.ErrUnavailable, "InternalError"},
		"a service that has given up":                           {answer(400, "RequestTimeout"), write, storage.ErrUnavailable, "RequestTimeout"},
		"throttling that lasts is an error":                     {answer(503, "SlowDown"), write, storage.ErrThrottled, "SlowDown"},
		"throttling without a name":                             {answer(503, "ServiceUnavailable"), list, storage.ErrThrottled, ""},
		"throttling by others than Amazon":                      {answer(429, "TooManyRequests"), read, storage.ErrThrottled, ""},
		"expired credentials are named":                         {answer(400, "ExpiredToken"), read, storage.ErrCredentials, "ExpiredToken"},
		"a key that the service does not know":                  {answer(403, "InvalidAccessKeyId"), write, storage.ErrCredentials, "InvalidAccessKeyId"},
		"a wrong secret is no missing permission":               {answer(403, "SignatureDoesNotMatch"), list, storage.ErrCredentials, "SignatureDoesNotMatch"},
		"a connection that breaks":                              {func(http.ResponseWriter, *http.Request, http.Handler) bool { panic(http.ErrAbortHandler) }, list, storage.ErrUnavailable, ""},
		"another region is hinted at":                           {answer(301, "PermanentRedirect"), read, nil, "another region"},
		"a body that is too short is corrupt":                   {send("keyagent object 1 T"), read, storage.ErrCorrupt, ""},
		"an object of somebody else is corrupt":                 {send("hello\nworld"), read, storage.ErrCorrupt, ""},
		"a giant object is not read to its end":                 {send(strings.Repeat("x", 1<<20)), read, storage.ErrTooLarge, ""},
		"a body that breaks off is an error": {func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "short")
			return true
		}, read, storage.ErrUnavailable, "unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t)
			opts := s.options()
			opts.Attempts = 1
			st, err := New(t.Context(), opts)
			if err != nil {
				t.Fatal(err)
			}
			s.plays(c.trick)
			err = c.call(t.Context(), st)
			if err == nil || (c.want != nil && !errors.Is(err, c.want)) || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("%v, want %v with %q", err, c.want, c.text)
			}
			for _, never := range []error{storage.ErrNotFound, storage.ErrConflict, storage.ErrNoBucket, storage.ErrDenied, storage.ErrCredentials, storage.ErrThrottled} {
				if c.want != never && errors.Is(err, never) {
					t.Errorf("%v must not be %v", err, never)
				}
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error repeats credentials: %v", err)
			}
		})
	}
}

func TestAWriteWhoseAnswerWasLostIsNotAConflict(t *testing.T) {
	s := newService(t)
	st := s.open(t)
	var puts atomic.Int32
	s.plays(func(w http.ResponseWriter, r *http.Request, h http.Handler) bool {
		if r.Method == http.MethodPut && puts.Add(1) == 1 {
			h.ServeHTTP(httptest.NewRecorder(), r) // it is written
			return refusal(w, 500, "InternalError")
		}
		return false
	})
	v, err := st.Put(t.Context(), "x", []byte("one"), storage.Absent)
	if err != nil || puts.Load() != 2 {
		t.Fatalf("%v after %d attempts", err, puts.Load())
	}
	if _, err := st.Put(t.Context(), "x", []byte("two"), v); err != nil {
		t.Errorf("its version: %v", err)
	}
}

func TestAWriteThatIsAcknowledgedWithoutAnETagIsReadBack(t *testing.T) {
	s := newService(t)
	st := s.open(t)
	s.plays(func(w http.ResponseWriter, r *http.Request, h http.Handler) bool {
		if r.Method == http.MethodPut {
			h.ServeHTTP(httptest.NewRecorder(), r)
		}
		return r.Method == http.MethodPut // 200, and nothing else
	})
	v, err := st.Put(t.Context(), "x", []byte("one"), storage.Absent)
	if err != nil {
		t.Fatal(err)
	}
	if _, got, err := st.Get(t.Context(), "x"); err != nil || got != v {
		t.Errorf("%q, %v, want %q", got, err, v)
	}
}

func TestAServiceThatDoesNotAnswerIsGivenUp(t *testing.T) {
	s := newService(t)
	opts := s.options()
	st := s.open(t)
	st.opts.Timeout = 50 * time.Millisecond
	done := make(chan struct{})
	t.Cleanup(func() { close(done) })
	s.plays(func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		select {
		case <-r.Context().Done():
		case <-done:
		}
		return true
	})
	if _, _, err := st.Get(t.Context(), "x"); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("get: %v", err)
	}
	opts.Timeout = 50 * time.Millisecond
	if _, err := New(t.Context(), opts); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("new: %v", err)
	}
	opts.Endpoint, opts.Attempts, opts.Timeout = "http://127.0.0.1:1", 2, 5*time.Second
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("nobody listens: %v", err)
	}
}

func TestTheServiceIsToldHowToEncrypt(t *testing.T) {
	s := newService(t)
	opts := s.options()
	opts.Encryption, opts.KMSKey, opts.BucketOwner = "aws:kms", "alias/records", "123456789012"
	opts.Tags = storage.Tags{"team": "disks", "cost-center": "a/b = 1"}
	st, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	var seen http.Header
	s.plays(func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		seen = r.Header.Clone()
		return false
	})
	if _, err := st.Put(t.Context(), "x", nil, storage.Absent); err != nil {
		t.Fatal(err)
	}
	for k, want := range map[string]string{
		"X-Amz-Server-Side-Encryption": "aws:kms", "X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id": "alias/records",
		"X-Amz-Expected-Bucket-Owner": "123456789012", "If-None-Match": "*",
		"X-Amz-Tagging": "cost-center=a%2Fb+%3D+1&team=disks",
	} {
		if seen.Get(k) != want {
			t.Errorf("%s is %q", k, seen.Get(k))
		}
	}
}

func TestABucketIsMadeOnlyWhenThatIsAllowed(t *testing.T) {
	s := newService(t)
	opts := s.options()
	opts.CreateBucket = false
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrNoBucket) {
		t.Fatal(err)
	}
	s.open(t)
	if _, err := New(t.Context(), opts); err != nil {
		t.Fatal(err)
	}
	s.plays(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if r.Method == http.MethodGet {
			return refusal(w, 404, "NoSuchBucket")
		}
		return refusal(w, 403, "AccessDenied")
	})
	if _, err := New(t.Context(), s.options()); !errors.Is(err, storage.ErrDenied) || !strings.Contains(err.Error(), "s3:CreateBucket") {
		t.Error(err)
	}
}

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"no bucket":                         func(o *Options) { o.Bucket = "" },
		"an access point's ARN":             func(o *Options) { o.Bucket = "arn:aws:s3:::x" },
		"a directory bucket":                func(o *Options) { o.Bucket = "x--euc1-az1--x-s3" },
		"a prefix with dots":                func(o *Options) { o.Prefix = "../x" },
		"a tag with a line break":           func(o *Options) { o.Tags = storage.Tags{"a": "b\nc"} },
		"another encryption":                func(o *Options) { o.Encryption = "rot13" },
		"a key without its encryption":      func(o *Options) { o.KMSKey = "k" },
		"http to another machine":           func(o *Options) { o.Endpoint = "http://192.0.2.1" },
		"http to a name":                    func(o *Options) { o.Endpoint = "http://localhost" },
		"an endpoint with a user":           func(o *Options) { o.Endpoint = "https://u:hunter2@example.com" },
		"an endpoint that cannot be parsed": func(o *Options) { o.Endpoint = "https://hunter2\x00" },
	} {
		t.Run(name, func(t *testing.T) {
			opts := Options{Bucket: "b", Region: "eu-central-1"}
			change(&opts)
			if _, err := New(t.Context(), opts); err == nil || strings.Contains(err.Error(), "hunter2") {
				t.Fatal(err)
			}
		})
	}
}
