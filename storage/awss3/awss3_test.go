package awss3

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/storagetest"
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
					st, err := New(t.Context(), opts)
					if err != nil {
						t.Fatal(err)
					}
					return st
				}}
			})
		})
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
		"a service that fails leaves open what is there":        {answer(500, "InternalError"), read, nil, "InternalError"},
		"throttling that lasts is an error":                     {answer(503, "SlowDown"), write, nil, "SlowDown"},
		"expired credentials are named":                         {answer(400, "ExpiredToken"), read, nil, "ExpiredToken"},
		"another region is hinted at":                           {answer(301, "PermanentRedirect"), read, nil, "another region"},
		"a body that is too short is corrupt":                   {send("keyagent object 1 T"), read, storage.ErrCorrupt, ""},
		"an object of somebody else is corrupt":                 {send("hello\nworld"), read, storage.ErrCorrupt, ""},
		"a giant object is not read to its end":                 {send(strings.Repeat("x", 1<<20)), read, storage.ErrTooLarge, ""},
		"a body that breaks off is an error": {func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "short")
			return true
		}, read, nil, "unexpected EOF"},
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
			for _, never := range []error{storage.ErrNotFound, storage.ErrConflict} {
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
	if _, _, err := st.Get(t.Context(), "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("get: %v", err)
	}
	opts.Timeout = 50 * time.Millisecond
	if _, err := New(t.Context(), opts); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("new: %v", err)
	}
}

func TestTheServiceIsToldHowToEncrypt(t *testing.T) {
	s := newService(t)
	opts := s.options()
	opts.Encryption, opts.KMSKey, opts.BucketOwner = "aws:kms", "alias/records", "123456789012"
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
		if r.Method == http.MethodHead {
			w.WriteHeader(http.StatusNotFound)
			return true
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
