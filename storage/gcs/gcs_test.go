package gcs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cloud.google.com/go/auth"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/framed"
	"github.com/keyagent/keyagent/storage/storagetest"
	"github.com/keyagent/keyagent/test/sim/emulator"
	"github.com/keyagent/keyagent/test/sim/faultproxy"
)

func open(t *testing.T, opts Options) *Storage {
	t.Helper()
	s, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// call asks a service of a test for something.
func call(t *testing.T, method, url, body string) *http.Response {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	a, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Body.Close()
	if a.StatusCode >= 300 {
		t.Fatalf("%s %s: %s", method, url, a.Status)
	}
	a.Body = io.NopCloser(bytes.NewReader(read(t, a.Body)))
	return a
}

func read(t *testing.T, r io.Reader) []byte {
	t.Helper()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func isUpload(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/upload/") }

// asGoogleDoes mends what the emulator does differently: it deletes whatever
// ifGenerationMatch says, but looks at generation.
func asGoogleDoes(_ http.ResponseWriter, r *http.Request) bool {
	if q := r.URL.Query(); r.Method == http.MethodDelete && q.Has("ifGenerationMatch") {
		q.Set("generation", q.Get("ifGenerationMatch"))
		r.URL.RawQuery = q.Encode()
	}
	return false
}

func TestTheSuiteOfStorageHolds(t *testing.T) {
	service := emulator.GCS(t)
	var buckets atomic.Int32
	for _, prefix := range []string{"", "some/where"} {
		t.Run("with the prefix "+prefix, func(t *testing.T) {
			storagetest.Run(t, func(t *testing.T) storagetest.Bed {
				proxy := faultproxy.New(t, service)
				proxy.Answer(asGoogleDoes)
				bucket := fmt.Sprintf("records-%d", buckets.Add(1))
				opts := Options{Bucket: bucket, Prefix: prefix, Endpoint: proxy.URL}
				if prefix != "" {
					opts.Tags = storage.Tags{"team": "disks"}
				}
				call(t, http.MethodPost, service+"/storage/v1/b?project=p", `{"name":"`+bucket+`"}`)
				key := func(name string) string { return strings.TrimPrefix(prefix+"/"+name, "/") }
				return storagetest.Bed{
					Names:      2500, // the emulator compares each write with all objects
					Open:       func() storage.Storage { return open(t, opts) },
					Stall:      proxy.Stall,
					LoseAnswer: func() { proxy.LoseAnswer(isUpload) },
					Versions: func() func(string) int {
						call(t, http.MethodPatch, service+"/storage/v1/b/"+bucket, `{"versioning":{"enabled":true}}`)
						return func(name string) (n int) {
							var out struct {
								Items []struct{ Name, TimeDeleted string }
							}
							if err := json.Unmarshal(read(t, call(t, http.MethodGet, service+"/storage/v1/b/"+bucket+"/o?versions=true", "").Body), &out); err != nil {
								t.Fatal(err)
							}
							for _, o := range out.Items {
								if o.Name == key(name) && o.TimeDeleted != "" {
									n++
								}
							}
							return n
						}
					},
					Remove: func() {
						call(t, http.MethodDelete, service+"/storage/v1/b/"+bucket+"/o/"+url.PathEscape(key("a")), "")
						call(t, http.MethodDelete, service+"/storage/v1/b/"+bucket, "")
					},
					Plant: func(name string, data []byte) {
						call(t, http.MethodPost, service+"/upload/storage/v1/b/"+bucket+"/o?uploadType=media&name="+url.QueryEscape(key(name)), string(data))
					},
				}
			})
		})
	}
}

// service answers each request as a test wants; what it does not answer finds a
// bucket without objects.
func service(t *testing.T, answer func(http.ResponseWriter, *http.Request) bool) *faultproxy.Proxy {
	t.Helper()
	p := faultproxy.Handle(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/o") && r.Method == http.MethodGet {
			fmt.Fprint(w, "{}")
			return
		}
		refuse(w, 404, "notFound")
	}))
	p.Answer(answer)
	return p
}

func options(p *faultproxy.Proxy) Options {
	return Options{Bucket: "records", Prefix: "a/b", Endpoint: p.URL, Attempts: 1}
}

func refuse(w http.ResponseWriter, status int, reason string) bool {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"error":{"code":%d,"message":"in the words of the cloud","errors":[{"reason":%q,"message":"in the words of the cloud"}]}}`, status, reason)
	return true
}

func TestWhatTheServiceAnswersIsClassed(t *testing.T) {
	write := func(ctx context.Context, s *Storage) error {
		_, err := s.Put(ctx, "x", []byte("new"), storage.Absent)
		return err
	}
	change := func(ctx context.Context, s *Storage) error {
		_, err := s.Put(ctx, "x", []byte("new"), framed.JoinVersion("TOKEN", "1"))
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
	type trick = func(http.ResponseWriter, *http.Request) bool
	answer := func(status int, reason string) trick {
		return func(w http.ResponseWriter, _ *http.Request) bool { return refuse(w, status, reason) }
	}
	onUpload := func(f trick) trick {
		return func(w http.ResponseWriter, r *http.Request) bool { return isUpload(r) && f(w, r) }
	}
	send := func(body []byte, sum string) trick {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("X-Goog-Generation", "1")
			w.Header().Set("X-Goog-Hash", "crc32c="+sum)
			_, _ = w.Write(body)
			return true
		}
	}
	framed, _ := framed.Frame([]byte("data"))
	sum := func(b []byte) string { return encodeSum(crc32.Checksum(b, castagnoli)) }
	for name, c := range map[string]struct {
		trick trick
		call  func(context.Context, *Storage) error
		want  error
		text  string
	}{
		"a condition that does not hold is a conflict":          {onUpload(answer(412, "conditionNotMet")), write, storage.ErrConflict, ""},
		"an object that was to be replaced and is gone":         {onUpload(answer(404, "notFound")), change, storage.ErrConflict, ""},
		"a forbidden write names the permission":                {answer(403, "forbidden"), write, storage.ErrDenied, "storage.objects.create:"},
		"a forbidden replacement names both permissions":        {answer(403, "forbidden"), change, storage.ErrDenied, "storage.objects.create and storage.objects.delete"},
		"a forbidden read names both permissions":               {answer(403, "forbidden"), read, storage.ErrDenied, "storage.objects.get (or storage.objects.list"},
		"a forbidden list names the permission":                 {answer(403, "forbidden"), list, storage.ErrDenied, "storage.objects.list"},
		"a bucket that is gone is not an object that is absent": {answer(404, "notFound"), read, storage.ErrNoBucket, "records"},
		"a bucket that is gone takes no write":                  {answer(404, "notFound"), write, storage.ErrNoBucket, ""},
		"a bucket that is gone is not an empty list":            {answer(404, "notFound"), list, storage.ErrNoBucket, ""},
		"a service that does not know who asks":                 {answer(401, "required"), read, storage.ErrCredentials, "in the words"},
		"a service that fails leaves open what is there":        {answer(500, "backendError"), read, storage.ErrUnavailable, "backendError"},
		"a service that does not work at the moment":            {answer(503, "backendError"), write, storage.ErrUnavailable, ""},
		"throttling that lasts":                                 {answer(429, "rateLimitExceeded"), write, storage.ErrThrottled, ""},
		"throttling in the guise of a refusal":                  {answer(403, "userRateLimitExceeded"), list, storage.ErrThrottled, ""},
		"a request that the service does not understand":        {answer(400, "invalid"), write, nil, "invalid"},
		"a refusal that is a page": {func(w http.ResponseWriter, _ *http.Request) bool {
			http.Error(w, strings.Repeat("x", 9999), http.StatusBadGateway)
			return true
		}, read, storage.ErrUnavailable, "502"},
		"a connection that breaks":                         {func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }, list, storage.ErrUnavailable, ""},
		"a body that is too short is corrupt":              {send(framed[:20], sum(framed[:20])), read, storage.ErrCorrupt, ""},
		"an object of somebody else is corrupt":            {send([]byte("hello\nworld"), sum([]byte("hello\nworld"))), read, storage.ErrCorrupt, ""},
		"an object with another CRC32C than the service's": {send(framed, sum(framed[1:])), read, storage.ErrCorrupt, "CRC32C"},
		"a giant object is not read to its end":            {send(make([]byte, 1<<20), ""), read, storage.ErrTooLarge, ""},
		"a body that breaks off leaves open what is there": {func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "short")
			return true
		}, read, storage.ErrUnavailable, "unexpected EOF"},
		"an object without a generation": {func(w http.ResponseWriter, _ *http.Request) bool { _, _ = w.Write(framed); return true }, read, nil, "generation"},
		"a list that is not in order": {func(w http.ResponseWriter, _ *http.Request) bool {
			fmt.Fprint(w, `{"items":[{"name":"a/b/y"},{"name":"a/b/x"}]}`)
			return true
		}, list, nil, "in order"},
		"a list of what was not asked for": {func(w http.ResponseWriter, _ *http.Request) bool {
			fmt.Fprint(w, `{"items":[{"name":"z"}]}`)
			return true
		}, list, nil, "in order"},
	} {
		t.Run(name, func(t *testing.T) {
			p := service(t, nil)
			s := open(t, options(p))
			p.Answer(c.trick)
			err := c.call(t.Context(), s)
			if err == nil || (c.want != nil && !errors.Is(err, c.want)) || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("%v, want %v with %q", err, c.want, c.text)
			}
			for _, never := range []error{storage.ErrNotFound, storage.ErrConflict, storage.ErrNoBucket, storage.ErrDenied, storage.ErrCredentials, storage.ErrThrottled} {
				if c.want != never && errors.Is(err, never) {
					t.Errorf("%v must not be %v", err, never)
				}
			}
			if len(err.Error()) > 1000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		})
	}
}

func TestAListThatComesInPiecesIsPutTogether(t *testing.T) {
	p := service(t, nil)
	s := open(t, options(p))
	p.Answer(func(w http.ResponseWriter, r *http.Request) bool {
		q := r.URL.Query()
		if q.Get("prefix") != "a/b/v" || q.Get("startOffset") != "" && q.Get("startOffset") != "a/b/v1" {
			t.Errorf("asked for %v", q)
		}
		fmt.Fprint(w, map[string]string{
			"":          `{"items":[{"name":"a/b/v1"}],"nextPageToken":"some more"}`,
			"some more": `{"nextPageToken":"m 2"}`, // the service may give less than it has
			"m 2":       `{"items":[{"name":"a/b/v2"},{"name":"a/b/v3/.not ours"},{"name":"a/b/v4"}]}`,
		}[q.Get("pageToken")])
		return true
	})
	for limit, want := range map[int]string{1: "v2", 2: "v2 v4", 9: "v2 v4"} {
		if got, err := s.List(t.Context(), "v", "v1", limit); err != nil || strings.Join(got, " ") != want {
			t.Errorf("limit %d: %v, %v", limit, got, err)
		}
	}
}

func TestCredentialsThatAreNoneAreNamed(t *testing.T) {
	p := service(t, nil)
	for name, c := range map[string]struct {
		status int
		want   error
	}{"refused": {400, storage.ErrCredentials}, "not to be had at the moment": {503, storage.ErrUnavailable}} {
		t.Run(name, func(t *testing.T) {
			opts := options(p)
			opts.Credentials = auth.NewCredentials(&auth.CredentialsOptions{TokenProvider: tokens(func() (*auth.Token, error) {
				return nil, &auth.Error{Response: &http.Response{StatusCode: c.status}, Body: []byte("no token")}
			})})
			if _, err := New(t.Context(), opts); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", t.TempDir()+"/none")
	if _, err := New(t.Context(), Options{Bucket: "records"}); !errors.Is(err, storage.ErrCredentials) {
		t.Errorf("a file that is not there: %v", err)
	}
}

type tokens func() (*auth.Token, error)

func (f tokens) Token(context.Context) (*auth.Token, error) { return f() }

func TestTheServiceIsToldWhoAsksAndHowToEncrypt(t *testing.T) {
	var mu sync.Mutex
	seen := map[string]*http.Request{}
	body := map[string]string{}
	p := service(t, func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		seen[r.Method], body[r.Method] = r, string(read(t, r.Body))
		if r.Method == http.MethodPost {
			fmt.Fprint(w, `{"generation":"7"}`)
		}
		return r.Method == http.MethodPost
	})
	opts := options(p)
	opts.KMSKey = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
	opts.Tags = storage.Tags{"team": "disks"}
	opts.Credentials = auth.NewCredentials(&auth.CredentialsOptions{TokenProvider: tokens(func() (*auth.Token, error) {
		return &auth.Token{Value: "hunter2", Expiry: time.Now().Add(time.Hour)}, nil
	})})
	s := open(t, opts)
	if _, err := s.Put(t.Context(), "x", []byte("one"), storage.Absent); err != nil {
		t.Fatal(err)
	}
	r, sent := seen[http.MethodPost], body[http.MethodPost]
	for what, ok := range map[string]bool{
		"who":           r.Header.Get("Authorization") == "Bearer hunter2",
		"the condition": r.URL.Query().Get("ifGenerationMatch") == "0",
		"the key":       r.URL.Query().Get("kmsKeyName") == opts.KMSKey,
		"one request":   r.URL.Query().Get("uploadType") == "multipart",
		"the name":      strings.Contains(sent, `"name":"a/b/x"`),
		"the CRC32C":    strings.Contains(sent, `"crc32c":"`),
		"the tags":      strings.Contains(sent, `"metadata":{"team":"disks"}`),
	} {
		if !ok {
			t.Errorf("%s is missing: %s %v\n%s", what, r.URL, r.Header, sent)
		}
	}
	if got := seen[http.MethodGet].Header.Get("Authorization"); got != "Bearer hunter2" {
		t.Errorf("the list was asked for by %q", got)
	}
}

func TestAWriteWhoseAnswerWasLostIsNotAConflict(t *testing.T) {
	target := emulator.GCS(t)
	p := faultproxy.New(t, target)
	s := open(t, Options{Bucket: "records", Endpoint: p.URL, CreateBucket: true, Project: "p"})
	p.LoseAnswer(isUpload)
	v, err := s.Put(t.Context(), "x", []byte("one"), storage.Absent)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "x", []byte("two"), v); err != nil {
		t.Errorf("its version: %v", err)
	}
	p.Answer(func(w http.ResponseWriter, r *http.Request) bool {
		if isUpload(r) { // it is written, and acknowledged without a generation
			r.RequestURI = ""
			r.URL.Scheme, r.URL.Host = "http", strings.TrimPrefix(target, "http://")
			if a, err := http.DefaultClient.Do(r); err == nil {
				a.Body.Close()
			}
			fmt.Fprint(w, "{}")
		}
		return isUpload(r)
	})
	if v, err = s.Put(t.Context(), "y", []byte("one"), storage.Absent); err != nil {
		t.Fatal(err)
	}
	if _, got, err := s.Get(t.Context(), "y"); err != nil || got != v {
		t.Errorf("%q, %v, want %q", got, err, v)
	}
}

func TestADeletionWhoseAnswerWasLostIsDone(t *testing.T) {
	p := faultproxy.New(t, emulator.GCS(t))
	s := open(t, Options{Bucket: "records", Endpoint: p.URL, CreateBucket: true, Project: "p"})
	for name, status := range map[string]int{"x": http.StatusNotFound, "y": http.StatusPreconditionFailed} {
		v, err := s.Put(t.Context(), name, []byte("one"), storage.Absent)
		if err != nil {
			t.Fatal(err)
		}
		isDelete := func(r *http.Request) bool { return r.Method == http.MethodDelete }
		p.LoseAnswer(isDelete)
		var tries atomic.Int32
		p.Answer(func(w http.ResponseWriter, r *http.Request) bool {
			return isDelete(r) && tries.Add(1) == 2 && refuse(w, status, "of an object that is not there")
		})
		if err := s.Delete(t.Context(), name, v); err != nil || tries.Load() != 2 {
			t.Errorf("%d: %v after %d tries", status, err, tries.Load())
		}
	}
}

func TestWhatFailsForAMomentIsTriedAgain(t *testing.T) {
	p := service(t, nil)
	opts := options(p)
	opts.Attempts = 3
	s := open(t, opts)
	for _, failures := range []int32{2, 3} {
		var left atomic.Int32
		left.Store(failures)
		p.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
			return left.Add(-1) >= 0 && refuse(w, 503, "backendError")
		})
		before := p.Requests()
		if _, err := s.List(t.Context(), "", "", 1); errors.Is(err, storage.ErrUnavailable) != (failures == 3) {
			t.Errorf("%d failures: %v", failures, err)
		}
		if n := p.Requests() - before; n != 3 {
			t.Errorf("%d failures: %d requests", failures, n)
		}
	}
}

func TestAServiceThatDoesNotAnswerIsGivenUp(t *testing.T) {
	p := service(t, nil)
	opts := options(p)
	s := open(t, opts)
	s.opts.Timeout = 50 * time.Millisecond
	defer p.Stall()()
	if _, _, err := s.Get(t.Context(), "x"); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("get: %v", err)
	}
	opts.Timeout = 50 * time.Millisecond
	if _, err := New(t.Context(), opts); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("new: %v", err)
	}
	opts.Endpoint, opts.Attempts = "http://127.0.0.1:1", 2
	opts.Timeout = 5 * time.Second
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("nobody listens: %v", err)
	}
}

func TestABucketIsMadeOnlyWhenThatIsAllowed(t *testing.T) {
	var made atomic.Int32
	var status int
	p := service(t, nil)
	p.Answer(func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case r.Method == http.MethodPost && status != 0:
			made.Store(1)
			return refuse(w, status, "x")
		case r.Method == http.MethodPost:
			body := string(read(t, r.Body))
			for _, want := range []string{`"publicAccessPrevention":"enforced"`, `"location":"EU"`, `"enabled":true`, `"defaultKmsKeyName":"projects/k"`} {
				if !strings.Contains(body, want) {
					t.Errorf("%s is not in %s", want, body)
				}
			}
			made.Store(1)
			fmt.Fprint(w, "{}")
			return true
		}
		return made.Load() == 0 && refuse(w, 404, "notFound")
	})
	opts := options(p)
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrNoBucket) || !strings.Contains(err.Error(), "hint:") {
		t.Fatal(err)
	}
	opts.CreateBucket, opts.Project, opts.Location, opts.KMSKey = true, "p", "EU", "projects/k"
	open(t, opts)

	made.Store(0)
	status = http.StatusConflict
	open(t, opts) // another replica made it

	made.Store(0)
	status = http.StatusForbidden
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrDenied) || !strings.Contains(err.Error(), "storage.buckets.create in the project p") {
		t.Error(err)
	}
}

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"no bucket":                         func(o *Options) { o.Bucket = "" },
		"a bucket with a slash":             func(o *Options) { o.Bucket = "a/b" },
		"a prefix with dots":                func(o *Options) { o.Prefix = "../x" },
		"a tag with a line break":           func(o *Options) { o.Tags = storage.Tags{"a": "b\nc"} },
		"a bucket in no project":            func(o *Options) { o.CreateBucket = true },
		"a key of another form":             func(o *Options) { o.KMSKey = "k" },
		"a version of a key":                func(o *Options) { o.KMSKey = "projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1" },
		"http to another machine":           func(o *Options) { o.Endpoint = "http://192.0.2.1" },
		"http to a name":                    func(o *Options) { o.Endpoint = "http://localhost" },
		"an endpoint with a user":           func(o *Options) { o.Endpoint = "https://u:hunter2@example.com" },
		"an endpoint that cannot be parsed": func(o *Options) { o.Endpoint = "https://hunter2\x00" },
	} {
		t.Run(name, func(t *testing.T) {
			opts := Options{Bucket: "b"}
			change(&opts)
			if _, err := New(t.Context(), opts); err == nil || strings.Contains(err.Error(), "hunter2") || errors.Is(err, storage.ErrCredentials) {
				t.Fatal(err)
			}
		})
	}
}
