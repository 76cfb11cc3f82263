package vault

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/kmstest"
	"github.com/keyagent/keyagent/test/sim/faultproxy"
)

// transit is a server of the transit engine's two calls that does the real
// cryptography: AES-256-GCM with associated data, checked token and paths.
type transit struct {
	*faultproxy.Proxy
	mu   sync.Mutex
	keys map[string][]cipher.AEAD // by version, from 1
}

const token = "s.test-token"

func newTransit(t *testing.T, keys ...string) *transit {
	t.Helper()
	s := &transit{keys: map[string][]cipher.AEAD{}}
	for _, name := range keys {
		s.rotate(t, name)
	}
	s.Proxy = faultproxy.HandleTLS(t, s)
	return s
}

func (s *transit) rotate(t *testing.T, name string) {
	t.Helper()
	k := make([]byte, 32)
	rand.Read(k)
	block, err := aes.NewCipher(k)
	if err != nil {
		t.Fatal(err)
	}
	a, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[name] = append(s.keys[name], a)
}

func (s *transit) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fail := func(status int, text string) {
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(map[string][]string{"errors": {text}})
	}
	parts := strings.Split(r.URL.Path, "/") // "", v1, transit, verb, key
	var req struct {
		Plaintext      []byte `json:"plaintext"`
		Ciphertext     string `json:"ciphertext"`
		AssociatedData []byte `json:"associated_data"`
	}
	body, _ := io.ReadAll(r.Body)
	switch {
	case r.Header.Get("X-Vault-Token") != token:
		fail(http.StatusForbidden, "permission denied")
		return
	case len(parts) != 5 || parts[1] != "v1" || parts[2] != "transit" || s.keys[parts[4]] == nil:
		fail(http.StatusNotFound, "no handler for route")
		return
	case r.Method == http.MethodGet && parts[3] == "keys":
		fmt.Fprintf(w, `{"data":{"latest_version":%d}}`, len(s.keys[parts[4]]))
		return
	case r.Method != http.MethodPost:
		fail(http.StatusMethodNotAllowed, "unsupported operation")
		return
	case json.Unmarshal(body, &req) != nil:
		fail(http.StatusBadRequest, "failed to parse JSON input")
		return
	}
	versions := s.keys[parts[4]]
	if parts[3] == "encrypt" {
		sealed := versions[len(versions)-1].Seal(nil, nil, req.Plaintext, req.AssociatedData)
		fmt.Fprintf(w, `{"data":{"ciphertext":"vault:v%d:%s","key_version":%d}}`, len(versions), base64.StdEncoding.EncodeToString(sealed), len(versions))
		return
	}
	var version int
	var text string
	if _, err := fmt.Sscanf(req.Ciphertext, "vault:v%d:%s", &version, &text); err != nil || version < 1 || version > len(versions) {
		fail(http.StatusBadRequest, "invalid ciphertext: no prefix")
		return
	}
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		fail(http.StatusBadRequest, "invalid ciphertext: could not decode base64")
		return
	}
	plain, err := versions[version-1].Open(nil, nil, raw, req.AssociatedData)
	if err != nil {
		fail(http.StatusBadRequest, "cipher: message authentication failed")
		return
	}
	fmt.Fprintf(w, `{"data":{"plaintext":"%s"}}`, base64.StdEncoding.EncodeToString(plain))
}

func (s *transit) kms(t *testing.T, key, token string) *KMS {
	t.Helper()
	k, err := New(Options{Address: s.URL, Key: key, RootCAs: s.Roots, Attempts: 2,
		Token: func(context.Context) (*secret.Bytes, error) { return secret.From([]byte(token)) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

var binding = kms.Binding{VolumeID: "data", Purpose: kms.VolumeDEK, Version: 1, Length: 32}

func TestConformance(t *testing.T) {
	s := newTransit(t, "one", "two")
	kmstest.Run(t, kmstest.Bed{
		Open:   func(t *testing.T) kms.KMS { return s.kms(t, "one", token) },
		Other:  func(t *testing.T) kms.KMS { return s.kms(t, "two", token) },
		Rotate: func(t *testing.T) { s.rotate(t, "one") },
		Stall:  func(*testing.T) func() { return s.Stall() },
	})
}

func TestAnswersOfAServerThatDoesNotWork(t *testing.T) {
	s := newTransit(t, "one")
	key, w, err := s.kms(t, "one", token).Generate(t.Context(), binding)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Close()
	status := func(code int) func(http.ResponseWriter) bool {
		return func(w http.ResponseWriter) bool { w.WriteHeader(code); return true }
	}
	refuse := func(code int, text string) func(http.ResponseWriter) bool {
		return func(w http.ResponseWriter) bool {
			w.WriteHeader(code)
			fmt.Fprintf(w, `{"errors":[%q]}`, text)
			return true
		}
	}
	say := func(text string) func(http.ResponseWriter) bool {
		return func(w http.ResponseWriter) bool { _, _ = io.WriteString(w, text); return true }
	}
	for name, tt := range map[string]struct {
		trick func(http.ResponseWriter) bool
		want  error
	}{
		"sealed":                 {status(503), kms.ErrUnavailable},
		"throttled":              {status(429), kms.ErrThrottled},
		"a key that was deleted": {refuse(400, "encryption key not found"), kms.ErrKEK},
		"a version too old":      {refuse(400, "ciphertext or signature version is disallowed by policy (too old)"), kms.ErrKEK},
		"a token that expired":   {refuse(403, "permission denied; invalid token"), kms.ErrCredentials},
		"a token without rights": {refuse(403, "permission denied"), kms.ErrDenied},
		"broken":                 {status(500), kms.ErrUnavailable},
		"a redirect":             {status(307), kms.ErrUnavailable},
		"no JSON":                {say("hello"), kms.ErrUnavailable},
		"an endless answer":      {say(strings.Repeat("x", maxReply+1)), kms.ErrUnavailable},
		"a shorter key":          {say(`{"data":{"plaintext":"AAAA"}}`), kms.ErrWrongKey},
		"no key":                 {say(`{"data":{}}`), kms.ErrWrongKey},
		"a key that is no text":  {say(`{"data":{"plaintext":7}}`), kms.ErrWrongKey},
	} {
		t.Run(name, func(t *testing.T) {
			s.Answer(func(w http.ResponseWriter, _ *http.Request) bool { return tt.trick(w) })
			defer s.Heal()
			if _, err := s.kms(t, "one", token).Unwrap(t.Context(), binding, w); !errors.Is(err, tt.want) {
				t.Errorf("got %v", err)
			}
			if _, _, err := s.kms(t, "one", token).Generate(t.Context(), binding); err == nil {
				t.Error("a key was generated")
			}
		})
	}
}

func TestAMissingPermissionIsNamed(t *testing.T) {
	s := newTransit(t, "one")
	_, _, err := s.kms(t, "one", "s.expired").Generate(t.Context(), binding)
	if !errors.Is(err, kms.ErrDenied) || !strings.Contains(err.Error(), `capability "update" on path "transit/encrypt/one"`) {
		t.Fatal(err)
	}
	if strings.Contains(err.Error(), "s.expired") {
		t.Fatal("the error shows the token")
	}
}

func TestAServerOfAnotherAuthorityIsRefused(t *testing.T) {
	s := newTransit(t, "one")
	k := s.kms(t, "one", token)
	k.client.Transport.(*http.Transport).TLSClientConfig.RootCAs = x509.NewCertPool()
	if _, _, err := k.Generate(t.Context(), binding); !errors.Is(err, kms.ErrUnavailable) {
		t.Fatal(err)
	}
}

func TestWhatIsNotSetIsRefused(t *testing.T) {
	good := Options{Address: "https://vault:8200", Key: "k", RootCAs: x509.NewCertPool(),
		Token: func(context.Context) (*secret.Bytes, error) { return nil, nil }}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Options){
		"no address":        func(o *Options) { o.Address = "" },
		"plain HTTP":        func(o *Options) { o.Address = "http://vault:8200" },
		"a path":            func(o *Options) { o.Address += "/v1" },
		"a user":            func(o *Options) { o.Address = "https://u:p@vault:8200" },
		"no key":            func(o *Options) { o.Key = "" },
		"a key with a path": func(o *Options) { o.Key = "a/b" },
		"dots":              func(o *Options) { o.Mount = "../sys" },
		"no token":          func(o *Options) { o.Token = nil },
		"no authority":      func(o *Options) { o.RootCAs = nil },
	} {
		o := good
		change(&o)
		if _, err := New(o); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func TestWhatMayWorkLaterIsTriedAgainWithinBounds(t *testing.T) {
	s := newTransit(t, "one")
	k := s.kms(t, "one", token)
	s.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})
	if _, _, err := k.Generate(t.Context(), binding); !errors.Is(err, kms.ErrUnavailable) || s.Requests() != k.opts.Attempts {
		t.Errorf("%v after %d requests", err, s.Requests())
	}
	s.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
		if s.Requests()%2 == 1 {
			w.WriteHeader(http.StatusTooManyRequests)
		}
		return s.Requests()%2 == 1
	})
	key, _, err := k.Generate(t.Context(), binding)
	if err != nil {
		t.Fatal(err)
	}
	key.Close()
}

func TestAServerThatDoesNotAnswerIsGivenUp(t *testing.T) {
	s := newTransit(t, "one")
	k := s.kms(t, "one", token)
	k.opts.Timeout = 50 * time.Millisecond
	defer s.Stall()()
	if _, _, err := k.Generate(t.Context(), binding); !errors.Is(err, kms.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// Two servers have KEKs of two names, and a key finds its own.
func TestTwoServersHaveTwoNames(t *testing.T) {
	a, b := newTransit(t, "disks"), newTransit(t, "disks")
	there, here := a.kms(t, "disks", token), b.kms(t, "disks", token)
	key, w, err := there.Generate(t.Context(), binding)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Close()
	got, err := kms.WithOld(here, there).Unwrap(t.Context(), binding, w)
	if err != nil || !got.Equal(key) {
		t.Fatal(err)
	}
	if name, err := here.Current(t.Context()); err != nil || name == w.KEK {
		t.Errorf("%q, %v", name, err)
	}
}
