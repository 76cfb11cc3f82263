package azure

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
	"github.com/keyagent/keyagent/kms/kmstest"
	"github.com/keyagent/keyagent/test/sim/cloud/azurevault"
	"github.com/keyagent/keyagent/test/sim/cloud/entra"
	"github.com/keyagent/keyagent/test/sim/faultproxy"
)

const token = "hunter2-token"

var binding = kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 3, Length: 32}

// tokens is a credential that gives always the same one.
type tokens string

func (s tokens) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	if err := ctx.Err(); err != nil {
		return azcore.AccessToken{}, err
	}
	if s == "" {
		return azcore.AccessToken{}, errors.New("nobody is here")
	}
	return azcore.AccessToken{Token: string(s), ExpiresOn: time.Now().Add(time.Hour)}, nil
}

// bed is a vault with a proxy in front of it, and the keys kek and other.
type bed struct {
	*azurevault.Vault
	proxy *faultproxy.Proxy
}

func newBed(t testing.TB, kind string) *bed {
	t.Helper()
	v := &azurevault.Vault{
		Host: "tests.vault.azure.net", Authority: "https://login.example/tenant",
		Accepts: func(s string) bool { return s == token },
	}
	if kind == "oct-HSM" {
		v.Host, v.HSM = "tests.managedhsm.azure.net", true
	}
	for _, name := range []string{"kek", "other"} {
		create(t, v, name, kind)
	}
	return &bed{v, faultproxy.HandleTLS(t, v)}
}

func create(t testing.TB, v *azurevault.Vault, name, kind string, ops ...string) {
	t.Helper()
	if err := v.CreateKey(name, kind, ops...); err != nil {
		t.Fatal(err)
	}
}

func (b *bed) options(key string) Options {
	opts := Options{VaultName: "tests", VaultType: "keyvault", Key: key, Credential: tokens(token), Endpoint: b.proxy.URL, RootCAs: b.proxy.Roots}
	if b.HSM {
		opts.VaultType = "managedhsm"
	}
	return opts
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
	for _, kind := range []string{"RSA", "RSA-HSM", "oct-HSM"} {
		t.Run(kind, func(t *testing.T) {
			b := newBed(t, kind)
			kmstest.Run(t, kmstest.Bed{
				Open:   func(t *testing.T) kms.KMS { return open(t, b.options("kek")) },
				Other:  func(t *testing.T) kms.KMS { return open(t, b.options("other")) },
				Rotate: func(t *testing.T) { create(t, b.Vault, "kek", kind) },
				Stall:  func(*testing.T) func() { return b.proxy.Stall() },
			})
		})
	}
}

func TestAWrappedKeyOpensOnlyByTheConfiguredKey(t *testing.T) {
	b := newBed(t, "RSA")
	k := open(t, b.options("kek"))
	_, ours := wrapped(t, k)
	_, foreign := wrapped(t, open(t, b.options("other")))
	fails(t, k, foreign, kms.ErrKEKVersion)
	planted := ours
	planted.Blob = foreign.Blob
	fails(t, k, planted, kms.ErrWrongKey)
	asked := b.proxy.Requests()
	id := strings.TrimPrefix(ours.KEK, prefix)
	for what, kek := range map[string]string{
		"another vault":       strings.Replace(ours.KEK, "tests.", "evil.", 1),
		"another cloud":       strings.Replace(ours.KEK, ".net", ".cn", 1),
		"no version":          ours.KEK[:strings.LastIndex(ours.KEK, "/")],
		"an empty version":    ours.KEK[:strings.LastIndex(ours.KEK, "/")+1],
		"a version in dots":   ours.KEK[:strings.LastIndex(ours.KEK, "/")+1] + "..",
		"a query":             ours.KEK + "?x",
		"a line":              ours.KEK + "\n",
		"a scheme":            prefix + "https://" + id,
		"no prefix":           id,
		"a secret, not a key": strings.Replace(ours.KEK, "/keys/", "/secrets/", 1),
	} {
		w := ours
		w.KEK = kek
		if _, err := k.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrKEKVersion) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if b.proxy.Requests() != asked {
		t.Error("the vault was asked")
	}
	unknown := ours
	unknown.KEK = ours.KEK[:strings.LastIndex(ours.KEK, "/")+1] + strings.Repeat("0", 32)
	fails(t, k, unknown, kms.ErrKEK)
}

func TestAVersionThatIsDisabledIsSaidToBe(t *testing.T) {
	b := newBed(t, "RSA")
	k := open(t, b.options("kek"))
	key, w := wrapped(t, k)
	b.Enable("kek", false)
	fails(t, k, w, kms.ErrKEK)
	if _, err := k.Wrap(t.Context(), binding, key); !errors.Is(err, kms.ErrKEK) {
		t.Error(err)
	}
	if _, err := New(t.Context(), b.options("kek")); !errors.Is(err, kms.ErrKEK) {
		t.Error(err)
	}
	b.Enable("kek", true)
	create(t, b.Vault, "kek", "RSA")
	opens(t, k, w, key)
	if _, next := wrapped(t, k); next.KEK == w.KEK {
		t.Error("the new version is not used")
	}
}

// TestWhatAnybodyCanPlantUnderAnRSAKey is the limit of this backend, see the
// package documentation: the day it fails, the documentation is wrong.
func TestWhatAnybodyCanPlantUnderAnRSAKey(t *testing.T) {
	b := newBed(t, "RSA")
	k := open(t, b.options("kek"))
	_, w := wrapped(t, k)
	described, err := k.client.GetKey(t.Context(), "kek", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	public := &rsa.PublicKey{N: new(big.Int).SetBytes(described.Key.N), E: int(new(big.Int).SetBytes(described.Key.E).Int64())}
	content := bytes.Repeat([]byte{1}, contentKey)
	var planted blob
	planted.algorithm = algorithmRSA
	if planted.wrapped, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, public, content, nil); err != nil {
		t.Fatal(err)
	}
	kek, err := secret.From(content)
	if err != nil {
		t.Fatal(err)
	}
	mine, err := secret.From(bytes.Repeat([]byte{2}, binding.Length))
	if err != nil {
		t.Fatal(err)
	}
	if planted.sealed, err = backend.Seal(kek, binding, mine); err != nil {
		t.Fatal(err)
	}
	if w.Blob, err = planted.encode(); err != nil {
		t.Fatal(err)
	}
	opens(t, k, w, mine)
}

// answer is the error document of the service.
func answer(status int, code, inner string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		if status == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", `Bearer authorization="https://login.example/tenant", resource="https://vault.azure.net"`)
		}
		w.WriteHeader(status)
		more := ""
		if inner != "" {
			more = fmt.Sprintf(`,"innererror":{"code":%q}`, inner)
		}
		fmt.Fprintf(w, `{"error":{"code":%q,"message":"in the words of the cloud"%s}}`, code, more)
		return true
	}
}

func TestWhatTheServiceAnswersIsClassed(t *testing.T) {
	for _, kind := range []string{"RSA", "oct-HSM"} {
		b := newBed(t, kind)
		opts := b.options("kek")
		opts.Attempts = 1
		k := open(t, opts)
		key, w := wrapped(t, k)
		calls := map[operation]func() error{
			wrap:   func() error { _, err := k.Wrap(t.Context(), binding, key); return err },
			unwrap: func() error { _, err := k.Unwrap(t.Context(), binding, w); return err },
			get:    func() error { _, err := k.Current(t.Context()); return err },
		}
		all := []error{kms.ErrDenied, kms.ErrWrongKey, kms.ErrKEK, kms.ErrThrottled, kms.ErrCredentials}
		for _, c := range []struct {
			status      int
			code, inner string
			want, open  error
		}{
			{401, "Unauthorized", "", kms.ErrCredentials, kms.ErrCredentials},
			{403, "Forbidden", "ForbiddenByPolicy", kms.ErrDenied, kms.ErrDenied},
			{403, "Forbidden", "ForbiddenByRbac", kms.ErrDenied, kms.ErrDenied},
			{403, "Forbidden", "ForbiddenByFirewall", kms.ErrDenied, kms.ErrDenied},
			{403, "Forbidden", "", kms.ErrDenied, kms.ErrDenied},
			{403, "Forbidden", "KeyDisabled", kms.ErrKEK, kms.ErrKEK},
			{403, "KeyDisabled", "", kms.ErrKEK, kms.ErrKEK},
			{403, "Forbidden", "KeyExpired", kms.ErrKEK, kms.ErrKEK},
			{404, "KeyNotFound", "", kms.ErrKEK, kms.ErrKEK},
			{400, "BadParameter", "", kms.ErrKEK, kms.ErrWrongKey},
			{400, "Other", "", kms.ErrUnavailable, kms.ErrUnavailable},
			{409, "Conflict", "", kms.ErrUnavailable, kms.ErrUnavailable},
			{429, "Throttled", "", kms.ErrThrottled, kms.ErrThrottled},
			{500, "InternalServerError", "", kms.ErrUnavailable, kms.ErrUnavailable},
			{503, "ServiceUnavailable", "", kms.ErrUnavailable, kms.ErrUnavailable},
		} {
			b.proxy.Answer(answer(c.status, c.code, c.inner))
			for op, call := range calls {
				want := c.want
				if op == unwrap {
					want = c.open
				}
				err := call()
				if !errors.Is(err, want) || !strings.Contains(err.Error(), c.code) || !strings.Contains(err.Error(), c.inner) {
					t.Errorf("%d %s on %s: %v, want %v", c.status, c.code, op.name, err, want)
					continue
				}
				for _, other := range all {
					if other != want && errors.Is(err, other) {
						t.Errorf("%d %s on %s: %v is also %v", c.status, c.code, op.name, err, other)
					}
				}
				if want == kms.ErrDenied && !strings.Contains(err.Error(), k.permission(op)) {
					t.Errorf("the permission %s is not named: %v", k.permission(op), err)
				}
				quiet(t, err, key)
			}
		}
		for _, f := range []func(http.ResponseWriter, *http.Request) bool{
			func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, "<html>hunter2"); return true },
			func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, "{}"); return true },
			func(w http.ResponseWriter, r *http.Request) bool {
				http.Redirect(w, r, "https://192.0.2.1/hunter2", http.StatusTemporaryRedirect)
				return true
			},
			func(w http.ResponseWriter, r *http.Request) bool {
				w.Header().Set("WWW-Authenticate", `Bearer authorization="x", resource="https://vault.azure.net"`)
				w.WriteHeader(401)
				return true
			},
		} {
			b.proxy.Answer(f)
			for op, call := range calls {
				err := call()
				if !errors.Is(err, kms.ErrUnavailable) && !errors.Is(err, kms.ErrCredentials) {
					t.Errorf("%s: %v", op.name, err)
				}
			}
		}
	}
}

// quiet demands that an error repeats neither a token nor a key.
func quiet(t *testing.T, err error, key *secret.Bytes) {
	t.Helper()
	_ = key.Use(func(p []byte) error {
		for _, never := range []string{"hunter2", string(p), base64.RawURLEncoding.EncodeToString(p), fmt.Sprintf("%x", p)} {
			if strings.Contains(err.Error(), never) {
				t.Errorf("the error says too much: %v", err)
			}
		}
		return nil
	})
}

func TestAnswersThatCannotBeAreRefused(t *testing.T) {
	b := newBed(t, "RSA")
	k := open(t, b.options("kek"))
	key, w := wrapped(t, k)
	kid := "https://" + strings.TrimPrefix(w.KEK, prefix)
	for what, c := range map[string]struct{ kid, value string }{
		"another key":         {strings.Replace(kid, "/kek/", "/other/", 1), strings.Repeat("A", 43)},
		"another version":     {kid[:len(kid)-32] + strings.Repeat("0", 32), strings.Repeat("A", 43)},
		"no ID":               {"", strings.Repeat("A", 43)},
		"a short key":         {kid, "AAAA"},
		"a wrong content key": {kid, strings.Repeat("A", 43)},
	} {
		b.proxy.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
			fmt.Fprintf(w, `{"kid":%q,"value":%q}`, c.kid, c.value)
			return true
		})
		if got, err := k.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrWrongKey) && !errors.Is(err, kms.ErrUnavailable) {
			t.Errorf("unwrap, %s: %v, %v", what, got, err)
		}
		// What is as long as a wrapped key is not told from one.
		if got, err := k.Wrap(t.Context(), binding, key); err == nil {
			t.Errorf("wrap, %s: %v", what, got)
		}
	}
}

func TestAKeyThatCannotWrapIsNotOpened(t *testing.T) {
	b := newBed(t, "RSA")
	create(t, b.Vault, "signs", "RSA", "sign", "verify")
	create(t, b.Vault, "half", "RSA", "wrapKey")
	create(t, b.Vault, "curve", "EC-HSM")
	create(t, b.Vault, "symmetric", "oct-HSM")
	for _, name := range []string{"signs", "half", "curve", "symmetric", "none"} {
		if _, err := New(t.Context(), b.options(name)); !errors.Is(err, kms.ErrKEK) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAMissingPermissionIsNamed(t *testing.T) {
	b := newBed(t, "RSA")
	k := open(t, b.options("kek"))
	key, w := wrapped(t, k)
	for _, op := range []string{"get", "wrapkey", "unwrapkey"} {
		b.Deny(op, "ForbiddenByRbac")
	}
	_, wrapErr := k.Wrap(t.Context(), binding, key)
	_, openErr := k.Unwrap(t.Context(), binding, w)
	_, newErr := New(t.Context(), b.options("kek"))
	for permission, err := range map[string]error{"keys/wrapKey": wrapErr, "keys/unwrapKey": openErr, "keys/get": newErr} {
		if !errors.Is(err, kms.ErrDenied) || !strings.Contains(err.Error(), permission) {
			t.Errorf("%s: %v", permission, err)
		}
	}
}

func TestCredentialsThatAreWrongOrMissingAreSaid(t *testing.T) {
	b := newBed(t, "RSA")
	for what, c := range map[string]tokens{"another token": "hunter2-other", "none": ""} {
		opts := b.options("kek")
		opts.Credential = c
		if _, err := New(t.Context(), opts); !errors.Is(err, kms.ErrCredentials) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestAClientSecretGetsATokenAndWraps(t *testing.T) {
	authority := &entra.Authority{Tenant: "72f988bf-86f1-41af-91ab-2d7cd011db47", Client: "keyagent", Secret: "hunter2-secret"}
	login := faultproxy.HandleTLS(t, authority)
	v := &azurevault.Vault{Host: "tests.vault.azure.net", Authority: login.URL + "/" + authority.Tenant}
	v.Accepts = func(token string) bool { return authority.Accepts(token, v.Resource()) }
	create(t, v, "kek", "RSA")
	proxy := faultproxy.HandleTLS(t, v)
	with := func(secret string) Options {
		c, err := azidentity.NewClientSecretCredential(authority.Tenant, authority.Client, secret, &azidentity.ClientSecretCredentialOptions{
			DisableInstanceDiscovery: true,
			ClientOptions: azcore.ClientOptions{
				Cloud:     cloud.Configuration{ActiveDirectoryAuthorityHost: login.URL},
				Transport: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: login.Roots}}},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		return Options{VaultName: "tests", Key: "kek", Credential: c, Endpoint: proxy.URL, RootCAs: proxy.Roots}
	}
	k := open(t, with(authority.Secret))
	key, w := wrapped(t, k)
	opens(t, k, w, key)
	if _, err := New(t.Context(), with("hunter2-wrong")); !errors.Is(err, kms.ErrCredentials) || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("a wrong secret: %v", err)
	}
}

func TestTheVaultMustBeVouchedFor(t *testing.T) {
	b := newBed(t, "RSA")
	opts := b.options("kek")
	opts.RootCAs, opts.Attempts = nil, 1
	if _, err := New(t.Context(), opts); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), "certificate") {
		t.Error(err)
	}
}

func TestAServiceThatDoesNotAnswerIsGivenUp(t *testing.T) {
	b := newBed(t, "RSA")
	opts := b.options("kek")
	k := open(t, opts)
	key, w := wrapped(t, k)
	k.opts.Timeout = 50 * time.Millisecond
	opts.Timeout = 50 * time.Millisecond
	defer b.proxy.Stall()()
	for what, call := range map[string]func() error{
		"wrap":    func() error { _, err := k.Wrap(t.Context(), binding, key); return err },
		"unwrap":  func() error { _, err := k.Unwrap(t.Context(), binding, w); return err },
		"current": func() error { _, err := k.Current(t.Context()); return err },
		"new":     func() error { _, err := New(t.Context(), opts); return err },
	} {
		if err := call(); !errors.Is(err, kms.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestRetriesAreBounded(t *testing.T) {
	b := newBed(t, "RSA")
	opts := b.options("kek")
	opts.Attempts = 3
	k := open(t, opts)
	key, w := wrapped(t, k)
	for status, want := range map[int]int{500: 3, 429: 3, 403: 1, 404: 1} {
		b.proxy.Answer(answer(status, "Code", ""))
		before := b.proxy.Requests()
		if _, err := k.Unwrap(t.Context(), binding, w); err == nil {
			t.Error("it opens")
		}
		if n := b.proxy.Requests() - before; n != want {
			t.Errorf("%d: %d attempts", status, n)
		}
	}
	b.proxy.Heal()
	b.proxy.LoseAnswer(func(*http.Request) bool { return true })
	opens(t, k, w, key)
}

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	for what, change := range map[string]func(*Options){
		"no vault":                          func(o *Options) { o.VaultName = "" },
		"a vault with its domain":           func(o *Options) { o.VaultName = "tests.vault.azure.net" },
		"a vault with two dashes":           func(o *Options) { o.VaultName = "te--sts" },
		"no key":                            func(o *Options) { o.Key = "" },
		"a key with its version":            func(o *Options) { o.Key = "kek/" + strings.Repeat("0", 32) },
		"no credential":                     func(o *Options) { o.Credential = nil },
		"another type":                      func(o *Options) { o.VaultType = "vault.example.com" },
		"the closed cloud":                  func(o *Options) { o.VaultType = "vault.microsoftazure.de" },
		"another cloud":                     func(o *Options) { o.Cloud = "germany" },
		"a domain of another cloud":         func(o *Options) { o.VaultType, o.Cloud = "vault.azure.cn", "public" },
		"an endpoint without TLS":           func(o *Options) { o.Endpoint = "http://127.0.0.1:1" },
		"an endpoint with a path":           func(o *Options) { o.Endpoint = "https://127.0.0.1:1/x" },
		"an endpoint with a user":           func(o *Options) { o.Endpoint = "https://u:hunter2@example.com" },
		"an endpoint that cannot be parsed": func(o *Options) { o.Endpoint = "https://hunter2\x00" },
		"a negative timeout":                func(o *Options) { o.Timeout = -1 },
		"negative attempts":                 func(o *Options) { o.Attempts = -1 },
	} {
		t.Run(what, func(t *testing.T) {
			b := newBed(t, "RSA")
			opts := b.options("kek")
			change(&opts)
			_, err := New(t.Context(), opts)
			if err == nil || strings.Contains(err.Error(), "hunter2") {
				t.Fatal(err)
			}
			if what == "another type" && !strings.Contains(err.Error(), "managedhsm.usgovcloudapi.net") {
				t.Errorf("what is allowed is not named: %v", err)
			}
			if b.proxy.Requests() != 0 {
				t.Error("the vault was asked")
			}
		})
	}
}

func TestTheDomainFollowsTheTypeAndTheCloud(t *testing.T) {
	for _, c := range []struct{ kind, cloud, want string }{
		{"", "", "vault.azure.net"},
		{"keyvault", "china", "vault.azure.cn"},
		{"keyvault", "usgovernment", "vault.usgovcloudapi.net"},
		{"managedhsm", "", "managedhsm.azure.net"},
		{"managedhsm", "china", "managedhsm.azure.cn"},
		{"vault.azure.net", "", "vault.azure.net"},
		{"vault.azure.cn", "", "vault.azure.cn"},
		{"vault.usgovcloudapi.net", "usgovernment", "vault.usgovcloudapi.net"},
		{"managedhsm.azure.net", "public", "managedhsm.azure.net"},
		{"managedhsm.usgovcloudapi.net", "", "managedhsm.usgovcloudapi.net"},
	} {
		opts := Options{VaultName: "Tests", VaultType: c.kind, Cloud: c.cloud, Key: "kek", Credential: tokens("t")}
		if got, err := opts.check(); err != nil || got != c.want || opts.VaultName != "tests" {
			t.Errorf("%q %q: %q, %v", c.kind, c.cloud, got, err)
		}
	}
}

func FuzzABlob(f *testing.F) {
	for _, b := range []blob{
		{algorithmRSA, make([]byte, 256), make([]byte, 60)},
		{algorithmAES, make([]byte, 40), make([]byte, 92)},
	} {
		data, err := b.encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := parseBlob(data)
		if err != nil {
			return
		}
		if again, err := b.encode(); err != nil || !bytes.Equal(again, data) {
			t.Fatalf("it is not what it was parsed from: %v", err)
		}
	})
}

// BenchmarkAKey compares this package with the bare calls of the SDK.
func BenchmarkAKey(b *testing.B) {
	s := newBed(b, "RSA")
	k := open(b, s.options("kek"))
	_, w := wrapped(b, k)
	parsed, err := parseBlob(w.Blob)
	if err != nil {
		b.Fatal(err)
	}
	algorithm := azkeys.EncryptionAlgorithm(algorithmRSA)
	version := w.KEK[strings.LastIndex(w.KEK, "/")+1:]
	kmstest.Bench(b, k, binding, w, kmstest.Bare{Unwrap: func() error {
		_, err := k.client.UnwrapKey(b.Context(), "kek", version, azkeys.KeyOperationParameters{Algorithm: &algorithm, Value: parsed.wrapped}, nil)
		return err
	}, Generate: func() error {
		_, err := k.client.WrapKey(b.Context(), "kek", "", azkeys.KeyOperationParameters{Algorithm: &algorithm, Value: make([]byte, 32)}, nil)
		return err
	}})
}
