package gcp

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/auth"
	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc/codes"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/kmstest"
	"github.com/keyagent/keyagent/test/sim/cloud/gcpkms"
	"github.com/keyagent/keyagent/test/sim/faultproxy"
)

var binding = kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 3, Length: 32}

// bed is the service with a proxy in front of it, and three keys a, b and c.
type bed struct {
	*gcpkms.Service
	proxy *faultproxy.Proxy
}

func newBed(t testing.TB) *bed {
	t.Helper()
	s := &gcpkms.Service{}
	for _, key := range []string{"a", "b", "c"} {
		s.CreateKey(name(key), kmspb.CryptoKey_ENCRYPT_DECRYPT)
	}
	return &bed{s, faultproxy.New(t, s.Start(t))}
}

func name(key string) string { return gcpkms.KeyName("hunter1-project", "europe-west3", "ring", key) }

func (b *bed) options(key string) Options {
	return Options{Project: "hunter1-project", Location: "europe-west3", KeyRing: "ring", Key: key, Endpoint: b.proxy.URL}
}

func open(t testing.TB, opts Options) *KMS {
	t.Helper()
	k, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func wrapped(t testing.TB, k *KMS) (*secret.Bytes, kms.Wrapped) {
	t.Helper()
	key, w, err := k.Generate(t.Context(), binding)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { key.Close() })
	return key, w
}

func opens(t *testing.T, k *KMS, w kms.Wrapped, key *secret.Bytes) {
	t.Helper()
	got, err := k.Unwrap(t.Context(), binding, w)
	if err != nil || !got.Equal(key) {
		t.Errorf("another key came back, %v", err)
	}
}

func fails(t *testing.T, k *KMS, w kms.Wrapped, want error) {
	t.Helper()
	if got, err := k.Unwrap(t.Context(), binding, w); !errors.Is(err, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
}

func TestTheSuiteOfKMSHolds(t *testing.T) {
	b := newBed(t)
	kmstest.Run(t, kmstest.Bed{
		Open:   func(t *testing.T) kms.KMS { return open(t, b.options("a")) },
		Other:  func(t *testing.T) kms.KMS { return open(t, b.options("b")) },
		Rotate: func(*testing.T) { b.Rotate(name("a")) },
		Stall:  func(*testing.T) func() { return b.proxy.Stall() },
	})
}

func TestAWrappedKeyOpensOnlyUnderAConfiguredKey(t *testing.T) {
	b := newBed(t)
	k := open(t, b.options("a"))
	key, foreign := wrapped(t, open(t, b.options("b")))
	fails(t, k, foreign, kms.ErrKEKVersion)
	planted := foreign
	planted.KEK = prefix + name("a") + "/cryptoKeyVersions/1"
	fails(t, k, planted, kms.ErrWrongKey)
	for what, kek := range map[string]string{
		"no version":         prefix + name("a"),
		"version 0":          prefix + name("a") + "/cryptoKeyVersions/0",
		"a padded version":   prefix + name("a") + "/cryptoKeyVersions/01",
		"an endless version": prefix + name("a") + "/cryptoKeyVersions/" + strings.Repeat("9", 30),
		"a path":             prefix + name("a") + "/../b/cryptoKeyVersions/1",
		"a line":             prefix + name("a") + "/cryptoKeyVersions/1\n",
		"no prefix":          name("a") + "/cryptoKeyVersions/1",
	} {
		w := foreign
		w.KEK = kek
		if _, err := k.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrKEKVersion) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := b.proxy.Requests(); n != 2 {
		t.Errorf("the service was asked %d times", n)
	}
	opts := b.options("a")
	opts.OldKeys = []string{name("c"), name("b")}
	opens(t, open(t, opts), foreign, key)
}

func TestAnOldBlobDoesNotGoByTheNameOfANewerVersion(t *testing.T) {
	b := newBed(t)
	k := open(t, b.options("a"))
	key, before := wrapped(t, k)
	b.Rotate(name("a"))
	_, after := wrapped(t, k)
	stale := before
	stale.KEK = after.KEK
	asked := b.proxy.Requests()
	fails(t, k, stale, kms.ErrWrongKey)
	if b.proxy.Requests() != asked {
		t.Error("the service was asked")
	}
	opens(t, k, before, key)
	b.SetState(name("a"), 1, kmspb.CryptoKeyVersion_DESTROYED)
	fails(t, k, before, kms.ErrKEK)
}

// refusal answers a gRPC call with a status.
func refusal(code codes.Code, message string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Grpc-Status", strconv.Itoa(int(code)))
		w.Header().Set("Grpc-Message", message)
		return true
	}
}

func TestWhatTheServiceAnswersIsClassed(t *testing.T) {
	b := newBed(t)
	opts := b.options("a")
	opts.Attempts = 1
	k := open(t, opts)
	key, w := wrapped(t, k)
	calls := map[operation]func() error{
		encrypt: func() error { _, err := k.Wrap(t.Context(), binding, key); return err },
		decrypt: func() error { _, err := k.Unwrap(t.Context(), binding, w); return err },
		get:     func() error { _, err := k.Current(t.Context()); return err },
	}
	all := []error{kms.ErrDenied, kms.ErrWrongKey, kms.ErrKEK, kms.ErrThrottled, kms.ErrCredentials}
	for _, c := range []struct {
		code       codes.Code
		wrap, open error
	}{
		{codes.PermissionDenied, kms.ErrDenied, kms.ErrDenied},
		{codes.Unauthenticated, kms.ErrCredentials, kms.ErrCredentials},
		{codes.NotFound, kms.ErrKEK, kms.ErrKEK},
		{codes.FailedPrecondition, kms.ErrKEK, kms.ErrKEK},
		{codes.InvalidArgument, kms.ErrKEK, kms.ErrWrongKey},
		{codes.ResourceExhausted, kms.ErrThrottled, kms.ErrThrottled},
		{codes.Unavailable, kms.ErrUnavailable, kms.ErrUnavailable},
		{codes.DeadlineExceeded, kms.ErrUnavailable, kms.ErrUnavailable},
		{codes.Internal, kms.ErrUnavailable, kms.ErrUnavailable},
		{codes.Unknown, kms.ErrUnavailable, kms.ErrUnavailable},
		{codes.Canceled, kms.ErrUnavailable, kms.ErrUnavailable}, // by the service, not by us
	} {
		b.proxy.Answer(refusal(c.code, "in the words of the cloud"))
		for op, call := range calls {
			want := c.wrap
			if op == decrypt {
				want = c.open
			}
			err := call()
			if !errors.Is(err, want) || !strings.Contains(err.Error(), "in the words") {
				t.Errorf("%s on %s: %v, want %v", c.code, op.name, err, want)
				continue
			}
			for _, other := range all {
				if other != want && errors.Is(err, other) {
					t.Errorf("%s on %s: %v is also %v", c.code, op.name, err, other)
				}
			}
			if errors.Is(err, context.Canceled) {
				t.Errorf("%s on %s: %v", c.code, op.name, err)
			}
			if want == kms.ErrDenied && !strings.Contains(err.Error(), op.permission) {
				t.Errorf("the permission %s is not named: %v", op.permission, err)
			}
			quiet(t, err, key)
		}
	}
	for _, f := range []func(http.ResponseWriter, *http.Request) bool{
		func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, "<html>hunter2"); return true },
		func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(502); return true },
	} {
		b.proxy.Answer(f)
		for op, call := range calls {
			if err := call(); !errors.Is(err, kms.ErrUnavailable) {
				t.Errorf("no gRPC on %s: %v", op.name, err)
			}
		}
	}
}

// quiet demands that an error does not repeat a key.
func quiet(t *testing.T, err error, key *secret.Bytes) {
	t.Helper()
	_ = key.Use(func(p []byte) error {
		for _, never := range []string{"hunter2", string(p), base64.StdEncoding.EncodeToString(p), fmt.Sprintf("%x", p)} {
			if strings.Contains(err.Error(), never) {
				t.Errorf("the error says too much: %v", err)
			}
		}
		return nil
	})
}

func TestDamageOnTheWayIsNoticed(t *testing.T) {
	b := newBed(t)
	opts := b.options("a")
	opts.Attempts = 1
	k := open(t, opts)
	key, w := wrapped(t, k)
	flip := func(p []byte) { p[len(p)/2] ^= 1 }
	for what, f := range map[string]func(any){
		"the plaintext that is sent": func(m any) {
			if r, ok := m.(*kmspb.EncryptRequest); ok {
				flip(r.Plaintext)
			}
		},
		"the binding": func(m any) {
			switch r := m.(type) {
			case *kmspb.EncryptRequest:
				flip(r.AdditionalAuthenticatedData)
			case *kmspb.DecryptRequest:
				flip(r.AdditionalAuthenticatedData)
			}
		},
		"the ciphertext": func(m any) {
			switch r := m.(type) {
			case *kmspb.EncryptResponse:
				flip(r.Ciphertext)
			case *kmspb.DecryptRequest:
				flip(r.Ciphertext)
			}
		},
		"the plaintext that is received": func(m any) {
			if r, ok := m.(*kmspb.DecryptResponse); ok {
				flip(r.Plaintext)
			}
		},
		"the checksums get lost": func(m any) {
			switch r := m.(type) {
			case *kmspb.EncryptRequest:
				r.PlaintextCrc32C = nil
			case *kmspb.DecryptResponse:
				r.PlaintextCrc32C = nil
			}
		},
		"the checksums of the answer get lost": func(m any) {
			switch r := m.(type) {
			case *kmspb.EncryptResponse:
				r.CiphertextCrc32C = nil
			case *kmspb.DecryptResponse:
				r.PlaintextCrc32C = nil
			}
		},
		"the binding's checksum gets lost": func(m any) {
			if r, ok := m.(*kmspb.EncryptRequest); ok {
				r.AdditionalAuthenticatedDataCrc32C = nil
			}
		},
	} {
		b.Damage(f)
		_, wrapErr := k.Wrap(t.Context(), binding, key)
		_, openErr := k.Unwrap(t.Context(), binding, w)
		if wrapErr == nil && openErr == nil {
			t.Errorf("%s: nobody noticed", what)
		}
		for _, err := range []error{wrapErr, openErr} {
			if err != nil && (!errors.Is(err, kms.ErrUnavailable) || errors.Is(err, kms.ErrWrongKey) || !strings.Contains(err.Error(), "damaged on the way")) {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
}

func TestAnswersThatCannotBeAreRefused(t *testing.T) {
	b := newBed(t)
	k := open(t, b.options("a"))
	key, w := wrapped(t, k)
	b.Damage(func(m any) {
		switch r := m.(type) {
		case *kmspb.EncryptResponse:
			r.Name = name("b") + "/cryptoKeyVersions/1"
		case *kmspb.CryptoKey:
			r.Primary.Name = name("b") + "/cryptoKeyVersions/1"
		case *kmspb.DecryptResponse:
			r.Plaintext, r.PlaintextCrc32C = make([]byte, 31), checksum(make([]byte, 31))
		}
	})
	if _, err := k.Wrap(t.Context(), binding, key); !errors.Is(err, kms.ErrUnavailable) {
		t.Error(err)
	}
	if _, err := k.Current(t.Context()); !errors.Is(err, kms.ErrUnavailable) {
		t.Error(err)
	}
	fails(t, k, w, kms.ErrWrongKey)
}

func TestAKeyThatCannotWrapIsSaidToBeOne(t *testing.T) {
	b := newBed(t)
	b.CreateKey(name("signs"), kmspb.CryptoKey_ASYMMETRIC_SIGN)
	b.SetState(name("b"), 1, kmspb.CryptoKeyVersion_DISABLED)
	for _, key := range []string{"signs", "b", "none"} {
		k := open(t, b.options(key))
		if _, err := k.Current(t.Context()); !errors.Is(err, kms.ErrKEK) {
			t.Errorf("%s: %v", key, err)
		}
		if _, _, err := k.Generate(t.Context(), binding); !errors.Is(err, kms.ErrKEK) {
			t.Errorf("%s: %v", key, err)
		}
	}
}

func TestAServiceThatDoesNotAnswerIsGivenUp(t *testing.T) {
	b := newBed(t)
	opts := b.options("a")
	opts.Timeout = 50 * time.Millisecond
	k := open(t, opts)
	key, w := wrapped(t, open(t, b.options("a")))
	defer b.proxy.Stall()()
	for what, call := range map[string]func() error{
		"wrap":    func() error { _, err := k.Wrap(t.Context(), binding, key); return err },
		"unwrap":  func() error { _, err := k.Unwrap(t.Context(), binding, w); return err },
		"current": func() error { _, err := k.Current(t.Context()); return err },
	} {
		start := time.Now()
		if err := call(); !errors.Is(err, kms.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", what, err)
		}
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("%s: after %s", what, d)
		}
	}
}

func TestRetriesAreBounded(t *testing.T) {
	b := newBed(t)
	opts := b.options("a")
	opts.Attempts = 3
	k := open(t, opts)
	key, w := wrapped(t, k)
	for code, want := range map[codes.Code]int{codes.Unavailable: 3, codes.Internal: 3, codes.ResourceExhausted: 3, codes.PermissionDenied: 1, codes.NotFound: 1} {
		b.proxy.Answer(refusal(code, ""))
		before := b.proxy.Requests()
		if _, err := k.Unwrap(t.Context(), binding, w); err == nil {
			t.Error("it opens")
		}
		if n := b.proxy.Requests() - before; n != want {
			t.Errorf("%s: %d attempts", code, n)
		}
	}
	b.proxy.Heal()
	b.proxy.LoseAnswer(func(*http.Request) bool { return true })
	opens(t, k, w, key)
}

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	for what, change := range map[string]func(*Options){
		"no project":                        func(o *Options) { o.Project = "" },
		"no location":                       func(o *Options) { o.Location = "" },
		"no key ring":                       func(o *Options) { o.KeyRing = "" },
		"no key":                            func(o *Options) { o.Key = "" },
		"a key with a slash":                func(o *Options) { o.Key = "a/cryptoKeyVersions/1" },
		"a ring with dots":                  func(o *Options) { o.KeyRing = ".." },
		"an old key without its project":    func(o *Options) { o.OldKeys = []string{"b"} },
		"an old key with its version":       func(o *Options) { o.OldKeys = []string{name("b") + "/cryptoKeyVersions/1"} },
		"http to another machine":           func(o *Options) { o.Endpoint = "http://192.0.2.1:80" },
		"http to a name":                    func(o *Options) { o.Endpoint = "http://localhost:80" },
		"an endpoint without a port":        func(o *Options) { o.Endpoint = "https://example.com" },
		"an endpoint with a user":           func(o *Options) { o.Endpoint = "https://u:hunter2@example.com:443" },
		"an endpoint that cannot be parsed": func(o *Options) { o.Endpoint = "https://hunter2\x00" },
		"a negative timeout":                func(o *Options) { o.Timeout = -1 },
		"negative attempts":                 func(o *Options) { o.Attempts = -1 },
		"credentials without TLS": func(o *Options) {
			o.Credentials = auth.NewCredentials(&auth.CredentialsOptions{TokenProvider: tokens("hunter2")})
		},
	} {
		t.Run(what, func(t *testing.T) {
			opts := Options{Project: "project", Location: "europe-west3", KeyRing: "ring", Key: "a", Endpoint: "http://127.0.0.1:1"}
			change(&opts)
			if _, err := New(t.Context(), opts); err == nil || strings.Contains(err.Error(), "hunter2") {
				t.Fatal(err)
			}
		})
	}
	t.Run("no credentials in the chain", func(t *testing.T) {
		t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", t.TempDir()+"/none")
		opts := Options{Project: "project", Location: "europe-west3", KeyRing: "ring", Key: "a"}
		if _, err := New(t.Context(), opts); !errors.Is(err, kms.ErrCredentials) {
			t.Error(err)
		}
	})
}

// tokens gives always the same one.
type tokens string

func (s tokens) Token(context.Context) (*auth.Token, error) {
	if s == "" {
		return nil, errors.New("nobody is here")
	}
	return &auth.Token{Value: string(s), Type: "Bearer"}, nil
}

func FuzzABlob(f *testing.F) {
	f.Add(joinBlob(1, []byte("ciphertext")))
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		version, ciphertext, ok := splitBlob(data)
		if ok && !bytes.Equal(joinBlob(version, ciphertext), data) {
			t.Fatal("it is not what it was parsed from")
		}
	})
}

// BenchmarkAKey compares this package with the bare calls of the SDK.
func BenchmarkAKey(b *testing.B) {
	s := newBed(b)
	k := open(b, s.options("a"))
	_, w := wrapped(b, k)
	_, ciphertext, _ := splitBlob(w.Blob)
	aad := binding.Encode(domain)
	kmstest.Bench(b, k, binding, w, kmstest.Bare{Unwrap: func() error {
		_, err := k.client.Decrypt(b.Context(), &kmspb.DecryptRequest{Name: k.name, Ciphertext: ciphertext, AdditionalAuthenticatedData: aad})
		return err
	}, Generate: func() error {
		_, err := k.client.Encrypt(b.Context(), &kmspb.EncryptRequest{Name: k.name, Plaintext: make([]byte, 32), AdditionalAuthenticatedData: aad})
		return err
	}})
}
