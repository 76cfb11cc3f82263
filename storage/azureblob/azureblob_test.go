package azureblob

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/framed"
	"github.com/keyagent/keyagent/storage/storagetest"
	"github.com/keyagent/keyagent/test/sim/emulator"
	"github.com/keyagent/keyagent/test/sim/faultproxy"
)

// token is a credential that is what it says, unless it is empty.
type token string

func (s token) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	if s == "" {
		return azcore.AccessToken{}, errors.New("nobody is logged in")
	}
	return azcore.AccessToken{Token: string(s), ExpiresOn: time.Now().Add(time.Hour)}, nil
}

func open(t *testing.T, opts Options) *Storage {
	t.Helper()
	s, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// account is the emulator as its operator has it.
type account struct {
	emulator.AzureServer
	client *http.Client
}

func newAccount(t *testing.T) *account {
	t.Helper()
	s := emulator.AzureBlob(t)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.Roots}}
	t.Cleanup(transport.CloseIdleConnections)
	return &account{s, &http.Client{Transport: transport}}
}

func (a *account) call(t *testing.T, method, path string, body []byte) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, a.URL+"/"+path, strings.NewReader(string(body)))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+a.Token())
	r.Header.Set("X-Ms-Version", apiVersion)
	if !r.URL.Query().Has("comp") {
		r.Header.Set("X-Ms-Blob-Type", "BlockBlob")
	}
	resp, err := a.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		text, _ := io.ReadAll(resp.Body)
		t.Fatalf("%s %s: %s %s", method, path, resp.Status, text)
	}
}

// behind are options that reach the account through a proxy.
func (a *account) behind(t *testing.T, container string) (*faultproxy.Proxy, Options) {
	t.Helper()
	proxy := faultproxy.NewTLS(t, strings.TrimSuffix(a.URL, "/devstoreaccount1"))
	return proxy, Options{Endpoint: proxy.URL + "/devstoreaccount1", RootCAs: proxy.Roots, Credential: token(a.Token()), Container: container}
}

func isWrite(r *http.Request) bool { return r.Method == http.MethodPut }

func TestTheSuiteOfStorageHolds(t *testing.T) {
	service := newAccount(t)
	var containers atomic.Int32
	for _, prefix := range []string{"", "some/where"} {
		t.Run("with the prefix "+prefix, func(t *testing.T) {
			storagetest.Run(t, func(t *testing.T) storagetest.Bed {
				container := fmt.Sprintf("records-%d", containers.Add(1))
				proxy, opts := service.behind(t, container)
				opts.Prefix = prefix
				if prefix != "" {
					opts.Tags = storage.Tags{"team": "disks"}
				}
				service.call(t, http.MethodPut, container+"?restype=container", nil)
				return storagetest.Bed{
					Names:      2500, // the emulator takes 5 ms for each
					Open:       func() storage.Storage { return open(t, opts) },
					Stall:      proxy.Stall,
					LoseAnswer: func() { proxy.LoseAnswer(isWrite) },
					Remove:     func() { service.call(t, http.MethodDelete, container+"?restype=container", nil) },
					Plant: func(name string, data []byte) {
						service.call(t, http.MethodPut, container+"/"+strings.TrimPrefix(prefix+"/"+name, "/"), data)
					},
				}
			})
		})
	}
}

// service answers each request as a test wants; what it does not answer finds a
// container without objects.
func service(t *testing.T) (*faultproxy.Proxy, Options) {
	t.Helper()
	p := faultproxy.Handle(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<EnumerationResults/>") }))
	return p, Options{Endpoint: p.URL, Container: "records", Prefix: "a/b", Credential: token("hunter2"), Attempts: 1}
}

type trick = func(http.ResponseWriter, *http.Request) bool

func refusal(status int, code string) trick {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		if code != "" {
			w.Header().Set("X-Ms-Error-Code", code)
		}
		w.Header().Set("X-Ms-Request-Id", "r-1")
		w.WriteHeader(status)
		fmt.Fprintf(w, "<Error><Code>%s</Code><Message>%s</Message></Error>", code, strings.Repeat("x", 5000))
		return true
	}
}

func TestWhatTheServiceAnswersIsClassed(t *testing.T) {
	write := func(ctx context.Context, s *Storage) error {
		_, err := s.Put(ctx, "x", []byte("new"), storage.Absent)
		return err
	}
	change := func(ctx context.Context, s *Storage) error {
		_, err := s.Put(ctx, "x", []byte("new"), framed.JoinVersion("TOKEN", `"e"`))
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
	send := func(body string) trick {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("ETag", `"e"`)
			fmt.Fprint(w, body)
			return true
		}
	}
	entry := func(name, more string) string { return "<Blob><Name>" + name + "</Name>" + more + "</Blob>" }
	names := func(blobs string) trick {
		return send("<EnumerationResults><Blobs>" + blobs + "</Blobs></EnumerationResults>")
	}
	// A write that is refused is looked for: there is none.
	thenGone := func(f trick) trick {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut {
				return f(w, r)
			}
			return refusal(404, "BlobNotFound")(w, r)
		}
	}
	framed, _ := framed.Frame([]byte("data"))
	for name, c := range map[string]struct {
		trick trick
		call  func(context.Context, *Storage) error
		want  error
		text  string
	}{
		"an object that is absent":                             {refusal(404, "BlobNotFound"), read, storage.ErrNotFound, ""},
		"an object that is there and was not to be":            {thenGone(refusal(409, "BlobAlreadyExists")), write, storage.ErrConflict, ""},
		"a condition that does not hold is a conflict":         {thenGone(refusal(412, "ConditionNotMet")), change, storage.ErrConflict, ""},
		"an object that was to be replaced and is gone":        {refusal(404, "BlobNotFound"), change, storage.ErrConflict, ""},
		"an object that somebody leased is not a conflict":     {refusal(412, "LeaseIdMissing"), change, nil, "LeaseIdMissing"},
		"a forbidden write names the permission":               {refusal(403, "AuthorizationPermissionMismatch"), write, storage.ErrDenied, actions + "blobs/write"},
		"a forbidden overwrite names the permission":           {refusal(403, "UnauthorizedBlobOverwrite"), change, storage.ErrDenied, actions + "blobs/write"},
		"a forbidden read names the permission":                {refusal(403, "AuthorizationFailure"), read, storage.ErrDenied, actions + "blobs/read"},
		"a forbidden list names the permission":                {refusal(403, "AuthorizationPermissionMismatch"), list, storage.ErrDenied, actions + "blobs/read"},
		"a container that is gone is not an object that is":    {refusal(404, "ContainerNotFound"), read, storage.ErrNoBucket, "records"},
		"a container that is being deleted takes no write":     {refusal(409, "ContainerBeingDeleted"), write, storage.ErrNoBucket, ""},
		"a container that is gone is not an empty list":        {refusal(404, "ContainerNotFound"), list, storage.ErrNoBucket, ""},
		"404 without a reason is not an object that is absent": {refusal(404, ""), read, nil, "404"},
		"a token that is not accepted":                         {refusal(401, "InvalidAuthenticationInfo"), read, storage.ErrCredentials, ""},
		"a token that the service cannot check":                {refusal(403, "AuthenticationFailed"), list, storage.ErrCredentials, ""},
		"throttling that lasts":                                {refusal(503, "ServerBusy"), write, storage.ErrThrottled, ""},
		"throttling by another name":                           {refusal(429, "TooManyRequests"), read, storage.ErrThrottled, ""},
		"a service that fails leaves open what is there":       {refusal(500, "InternalError"), read, storage.ErrUnavailable, "InternalError"},
		"a service that has given up":                          {refusal(500, "OperationTimedOut"), write, storage.ErrUnavailable, "r-1"},
		"a request that the service does not understand":       {refusal(400, "InvalidHeaderValue"), write, nil, "InvalidHeaderValue"},
		"a refusal that is a page":                             {refusal(502, ""), list, storage.ErrUnavailable, "502"},
		"a connection that breaks":                             {func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }, list, storage.ErrUnavailable, ""},
		"a body that is too short is corrupt":                  {send(string(framed[:20])), read, storage.ErrCorrupt, ""},
		"an object of somebody else is corrupt":                {send("hello\nworld"), read, storage.ErrCorrupt, ""},
		"a giant object is not read to its end":                {send(strings.Repeat("x", 1<<20)), read, storage.ErrTooLarge, ""},
		"an object without an ETag":                            {func(w http.ResponseWriter, _ *http.Request) bool { _, _ = w.Write(framed); return true }, read, nil, "ETag"},
		"a list that is not XML":                               {send("<html>"), list, nil, "cannot be read"},
		"a list that is not in order":                          {names(entry("a/b/y", "") + entry("a/b/x", "")), list, nil, "in order"},
		"a list of what was not asked for":                     {names(entry("z", "")), list, nil, "in order"},
		"a list of folders":                                    {names(entry("a/b/x", "<Properties><ResourceType>directory</ResourceType></Properties>")), list, nil, "hierarchical namespace"},
		"a body that breaks off leaves open what is there": {func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "short")
			return true
		}, read, storage.ErrUnavailable, "unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			p, opts := service(t)
			s := open(t, opts)
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
			if strings.Contains(err.Error(), "hunter2") || len(err.Error()) > 1000 {
				t.Errorf("the error says too much: %v", err)
			}
		})
	}
}

func TestAListThatComesInPiecesIsPutTogether(t *testing.T) {
	p, opts := service(t)
	s := open(t, opts)
	p.Answer(func(w http.ResponseWriter, r *http.Request) bool {
		q := r.URL.Query()
		if q.Get("prefix") != "a/b/v" || q.Get("startFrom") != "a/b/v1" || q.Get("restype") != "container" {
			t.Errorf("asked for %v", q)
		}
		for marker, answer := range map[string]string{
			"":          "<Blobs><Blob><Name>a/b/v1</Name></Blob></Blobs><NextMarker>some more</NextMarker>",
			"some more": "<Blobs/><NextMarker>m 2</NextMarker>", // the service may give less than it has
			"m 2":       "<Blobs><Blob><Name>a/b/v2</Name></Blob><Blob><Name>a/b/v3/.not ours</Name></Blob><Blob><Name>a/b/v4</Name></Blob></Blobs><NextMarker/>",
		} {
			if q.Get("marker") == marker {
				fmt.Fprintf(w, "<EnumerationResults>%s</EnumerationResults>", answer)
			}
		}
		return true
	})
	for limit, want := range map[int]string{1: "v2", 2: "v2 v4", 9: "v2 v4"} {
		if got, err := s.List(t.Context(), "v", "v1", limit); err != nil || strings.Join(got, " ") != want {
			t.Errorf("limit %d: %v, %v", limit, got, err)
		}
	}
}

func TestCredentialsThatAreNoneAreNamed(t *testing.T) {
	_, opts := service(t)
	opts.Credential = token("")
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrCredentials) || !strings.Contains(err.Error(), "nobody is logged in") {
		t.Error(err)
	}
	account := newAccount(t)
	opts = Options{Endpoint: account.URL, RootCAs: account.Roots, Container: "records", Credential: token("hunter2")}
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrCredentials) || strings.Contains(err.Error(), "hunter2") {
		t.Error(err)
	}
	opts.RootCAs = nil
	opts.Attempts = 1
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrUnavailable) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a certificate by nobody we know: %v", err)
	}
}

func TestAWriteWhoseAnswerWasLostIsNotAConflict(t *testing.T) {
	account := newAccount(t)
	p, opts := account.behind(t, "records")
	opts.CreateContainer = true
	s := open(t, opts)
	p.LoseAnswer(isWrite)
	before := p.Requests()
	v, err := s.Put(t.Context(), "x", []byte("one"), storage.Absent)
	if err != nil || p.Requests() != before+3 {
		t.Fatalf("%v after %d requests", err, p.Requests()-before)
	}
	if _, err := s.Put(t.Context(), "x", []byte("two"), v); err != nil {
		t.Errorf("its version: %v", err)
	}
	p.Answer(func(w http.ResponseWriter, r *http.Request) bool {
		if isWrite(r) { // it is written, and acknowledged without an ETag
			body, _ := io.ReadAll(r.Body)
			account.call(t, http.MethodPut, "records/y", body)
			w.WriteHeader(http.StatusCreated)
		}
		return isWrite(r)
	})
	if v, err = s.Put(t.Context(), "y", []byte("one"), storage.Absent); err != nil {
		t.Fatal(err)
	}
	if _, got, err := s.Get(t.Context(), "y"); err != nil || got != v {
		t.Errorf("%q, %v, want %q", got, err, v)
	}
}

func TestWhatFailsForAMomentIsTriedAgain(t *testing.T) {
	p, opts := service(t)
	opts.Attempts = 3
	s := open(t, opts)
	for _, failures := range []int32{2, 3} {
		var left atomic.Int32
		left.Store(failures)
		p.Answer(func(w http.ResponseWriter, r *http.Request) bool {
			return left.Add(-1) >= 0 && refusal(500, "InternalError")(w, r)
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
	p, opts := service(t)
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
	opts.Endpoint, opts.Attempts, opts.Timeout = "http://127.0.0.1:1", 2, 5*time.Second
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("nobody listens: %v", err)
	}
}

func TestTheServiceIsToldWhoAsksAndHowToEncrypt(t *testing.T) {
	p, opts := service(t)
	opts.EncryptionScope = "records-scope"
	opts.Tags = storage.Tags{"team": "disks", "cost-center": "a/b = 1"}
	s := open(t, opts)
	seen := make(chan *http.Request, 1)
	p.Answer(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("ETag", `"e"`)
		w.WriteHeader(http.StatusCreated)
		seen <- r.Clone(context.Background())
		return true
	})
	for _, expect := range []storage.Version{storage.Absent, framed.JoinVersion("T", `"e"`)} {
		if _, err := s.Put(t.Context(), "x", nil, expect); err != nil {
			t.Fatal(err)
		}
		r := <-seen
		want := map[string]string{
			"Authorization": "Bearer hunter2", "X-Ms-Encryption-Scope": "records-scope", "X-Ms-Blob-Type": "BlockBlob",
			"X-Ms-Version": apiVersion, "If-None-Match": "*", "If-Match": "", "X-Ms-Tags": "cost-center=a%2Fb+%3D+1&team=disks",
		}
		if expect != storage.Absent {
			want["If-None-Match"], want["If-Match"] = "", `"e"`
		}
		for k, v := range want {
			if r.Header.Get(k) != v {
				t.Errorf("%s is %q", k, r.Header.Get(k))
			}
		}
		if r.URL.Path != "/records/a/b/x" {
			t.Errorf("written to %s", r.URL.Path)
		}
	}
}

func TestAContainerIsMadeOnlyWhenThatIsAllowed(t *testing.T) {
	account := newAccount(t)
	_, opts := account.behind(t, "records")
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrNoBucket) || !strings.Contains(err.Error(), "hint:") {
		t.Fatal(err)
	}
	opts.CreateContainer = true
	open(t, opts)
	opts.CreateContainer = false
	open(t, opts)

	p, opts := service(t)
	opts.CreateContainer, opts.EncryptionScope = true, "records-scope"
	missing := func(f trick) trick {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet {
				return refusal(404, "ContainerNotFound")(w, r)
			}
			if got := r.Header.Get("X-Ms-Default-Encryption-Scope"); got != "records-scope" {
				t.Errorf("the scope is %q", got)
			}
			return f(w, r)
		}
	}
	p.Answer(missing(refusal(409, "ContainerAlreadyExists"))) // another replica made it
	open(t, opts)
	p.Answer(missing(refusal(403, "AuthorizationPermissionMismatch")))
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrDenied) || !strings.Contains(err.Error(), actions+"write") {
		t.Error(err)
	}
	p.Answer(missing(refusal(409, "ContainerBeingDeleted")))
	if _, err := New(t.Context(), opts); !errors.Is(err, storage.ErrNoBucket) {
		t.Error(err)
	}
}

func TestEachCloudHasItsEndpoint(t *testing.T) {
	for cloud, want := range map[string]string{
		"": "https://account.blob.core.windows.net", "public": "https://account.blob.core.windows.net",
		"china": "https://account.blob.core.chinacloudapi.cn", "usgovernment": "https://account.blob.core.usgovcloudapi.net",
	} {
		opts := Options{Account: "account", Container: "records", Credential: token("hunter2"), Cloud: cloud}
		if _, err := opts.check(); err != nil || opts.Endpoint != want {
			t.Errorf("%q: %q, %v", cloud, opts.Endpoint, err)
		}
	}
}

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"no account":                        func(o *Options) { o.Account = "" },
		"an account that is a host":         func(o *Options) { o.Account = "a.example.com" },
		"no container":                      func(o *Options) { o.Container = "" },
		"a container with capitals":         func(o *Options) { o.Container = "Records" },
		"a container with two dashes":       func(o *Options) { o.Container = "a--b" },
		"a container with a slash":          func(o *Options) { o.Container = "abc/def" },
		"a container with a long name":      func(o *Options) { o.Container = strings.Repeat("a", 64) },
		"a prefix with dots":                func(o *Options) { o.Prefix = "../x" },
		"a tag with a line break":           func(o *Options) { o.Tags = storage.Tags{"a": "b\nc"} },
		"no credential":                     func(o *Options) { o.Credential = nil },
		"another cloud":                     func(o *Options) { o.Cloud = "germany" },
		"a cloud and an endpoint":           func(o *Options) { o.Cloud, o.Endpoint = "public", "https://example.com" },
		"http to another machine":           func(o *Options) { o.Endpoint = "http://192.0.2.1" },
		"http to a name":                    func(o *Options) { o.Endpoint = "http://localhost" },
		"an endpoint with a user":           func(o *Options) { o.Endpoint = "https://u:hunter2@example.com" },
		"an endpoint that cannot be parsed": func(o *Options) { o.Endpoint = "https://hunter2\x00" },
	} {
		t.Run(name, func(t *testing.T) {
			opts := Options{Account: "account", Container: "records", Credential: token("hunter2")}
			change(&opts)
			if _, err := New(t.Context(), opts); err == nil || strings.Contains(err.Error(), "hunter2") || errors.Is(err, storage.ErrUnavailable) {
				t.Fatal(err)
			}
		})
	}
}
