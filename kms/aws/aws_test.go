package aws

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	sdkcredentials "github.com/aws/aws-sdk-go-v2/credentials"
	service "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/smithy-go"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/kmstest"
	"github.com/keyagent/keyagent/test/sim/cloud/awskms"
	"github.com/keyagent/keyagent/test/sim/faultproxy"
)

const (
	here  = "eu-central-1"
	there = "us-east-1"
)

var binding = kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 3, Length: 32}

// bed is the service, and a proxy in front of one of its Regions.
type bed struct {
	*awskms.Service
	proxy *faultproxy.Proxy
}

func newBed(t testing.TB) *bed {
	t.Helper()
	s := awskms.New("AKIDhunter2", "hunter2-key")
	return &bed{s, faultproxy.Handle(t, s.Region(here))}
}

func (b *bed) options(key string) Options {
	return Options{
		Key: key, Region: here, Endpoint: b.proxy.URL,
		Credentials: sdkcredentials.NewStaticCredentialsProvider(b.AccessKey, b.SecretKey, ""),
	}
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

// opens demands that w gives key.
func opens(t *testing.T, k *KMS, w kms.Wrapped, key *secret.Bytes) {
	t.Helper()
	got, err := k.Unwrap(t.Context(), binding, w)
	if err != nil || !got.Equal(key) {
		t.Errorf("another key came back, %v", err)
	}
}

// fails demands that w gives an error of a class.
func fails(t *testing.T, k *KMS, w kms.Wrapped, want error) {
	t.Helper()
	if got, err := k.Unwrap(t.Context(), binding, w); !errors.Is(err, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
}

// attester vouches for whatever it is given.
type attester struct{ documents atomic.Int32 }

func (a *attester) Document(_ context.Context, public []byte) ([]byte, error) {
	a.documents.Add(1)
	return append([]byte("document "), public...), nil
}

// publicKey reads a document of attester.
func publicKey(document []byte) (*rsa.PublicKey, error) {
	key, err := x509.ParsePKIXPublicKey(document[len("document "):])
	if err != nil {
		return nil, err
	}
	return key.(*rsa.PublicKey), nil
}

func TestTheSuiteOfKMSHolds(t *testing.T) {
	for _, form := range []string{"a key", "an alias that moves", "a recipient"} {
		t.Run(form, func(t *testing.T) {
			b := newBed(t)
			opts := b.options(b.CreateKey(here))
			second := b.CreateKey(here)
			suite := kmstest.Bed{
				Open:  func(t *testing.T) kms.KMS { return open(t, opts) },
				Other: func(t *testing.T) kms.KMS { return open(t, b.options(second)) },
				Stall: func(*testing.T) func() { return b.proxy.Stall() },
			}
			switch form {
			case "an alias that moves":
				first := opts.Key
				b.SetAlias("alias/keyagent", first)
				opts.Key, opts.OldKeys = "alias/keyagent", []string{first}
				suite.Rotate = func(*testing.T) { b.SetAlias("alias/keyagent", b.CreateKey(here)) }
			case "a recipient":
				a := &attester{}
				b.PublicKey, opts.Attester = publicKey, a
				defer func() {
					if a.documents.Load() == 0 {
						t.Error("no document was asked for")
					}
				}()
			}
			kmstest.Run(t, suite)
		})
	}
}

func TestAWrappedKeyOpensOnlyUnderAConfiguredKey(t *testing.T) {
	b := newBed(t)
	first, second, third := b.CreateKey(here), b.CreateKey(here), b.CreateKey(here)
	k := open(t, b.options(first))
	_, foreign := wrapped(t, open(t, b.options(second)))

	fails(t, k, foreign, kms.ErrKEKVersion)
	planted := foreign
	planted.KEK = prefix + first // the blob is still the other key's
	fails(t, k, planted, kms.ErrWrongKey)
	for name, kek := range map[string]string{
		"another account":    strings.Replace(prefix+first, awskms.Account, "999999999999", 1),
		"another partition":  strings.Replace(prefix+first, "arn:aws:", "arn:aws-cn:", 1),
		"another region":     strings.Replace(prefix+first, here, there, 1),
		"an alias":           prefix + "arn:aws:kms:" + here + ":" + awskms.Account + ":alias/x",
		"without its prefix": first,
	} {
		w := foreign
		w.KEK = kek
		if _, err := k.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrKEKVersion) {
			t.Errorf("%s: %v", name, err)
		}
	}

	opts := b.options(first)
	opts.OldKeys = []string{second, idOf(third)}
	k = open(t, opts)
	key, w := wrapped(t, open(t, b.options(second)))
	opens(t, k, w, key)
	key, w = wrapped(t, open(t, b.options(third)))
	opens(t, k, w, key)
}

func idOf(arn string) string { return arn[strings.LastIndex(arn, "/")+1:] }

func TestAnAliasThatMovedIsFollowedButItsFormerKeyIsNot(t *testing.T) {
	b := newBed(t)
	first, second := b.CreateKey(here), b.CreateKey(here)
	b.SetAlias("alias/keyagent", first)
	k, replica := open(t, b.options("alias/keyagent")), open(t, b.options("alias/keyagent"))
	key, before := wrapped(t, k)
	opens(t, k, before, key)

	b.SetAlias("alias/keyagent", second)
	fresh, after := wrapped(t, k)
	if name, err := k.Current(t.Context()); err != nil || name != prefix+second || after.KEK != name {
		t.Errorf("it is %q and wraps under %q, %v", name, after.KEK, err)
	}
	opens(t, replica, after, fresh) // which has not looked since
	fails(t, k, before, kms.ErrKEKVersion)

	opts := b.options("alias/keyagent")
	opts.OldKeys = []string{first}
	opens(t, open(t, opts), before, key)
}

func TestAMultiRegionKeyIsOneKey(t *testing.T) {
	b := newBed(t)
	first := b.CreateKey(there, here)
	far := faultproxy.Handle(t, b.Region(there))
	opts := b.options(first)
	opts.Region, opts.Endpoint = there, far.URL
	key, w := wrapped(t, open(t, opts))

	local := strings.Replace(first, there, here, 1)
	k := open(t, b.options(local))
	opens(t, k, w, key)
	if name, err := k.Current(t.Context()); err != nil || name != w.KEK || strings.Contains(name, here) || strings.Contains(name, there) {
		t.Errorf("here it has the name %q, there %q, %v", name, w.KEK, err)
	}
	named := w
	named.KEK = prefix + local // a name is written in one way
	fails(t, k, named, kms.ErrKEKVersion)
	opts = b.options(b.CreateKey(here))
	opts.OldKeys = []string{first}
	opens(t, open(t, opts), w, key)

	w.KEK = strings.Replace(w.KEK, awskms.Account, "999999999999", 1)
	fails(t, k, w, kms.ErrKEKVersion)
}

func TestRotatedMaterialOpensWhatItsPredecessorWrapped(t *testing.T) {
	b := newBed(t)
	arn := b.CreateKey(here)
	k := open(t, b.options(arn))
	key, w := wrapped(t, k)
	b.RotateMaterial(arn)
	opens(t, k, w, key)
	if _, next := wrapped(t, k); next.KEK != w.KEK {
		t.Errorf("the name became %q", next.KEK)
	}
}

// answer is the error document of the service.
func answer(status int, code string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"__type":%q,"message":"in the words of the cloud"}`, code)
		return true
	}
}

func TestWhatTheServiceAnswersIsClassed(t *testing.T) {
	b := newBed(t)
	opts := b.options(b.CreateKey(here))
	opts.Attempts = 1
	k := open(t, opts)
	key, w := wrapped(t, k)
	calls := map[string]func() error{
		"kms:Encrypt":     func() error { _, err := k.Wrap(t.Context(), binding, key); return err },
		"kms:Decrypt":     func() error { _, err := k.Unwrap(t.Context(), binding, w); return err },
		"kms:DescribeKey": func() error { _, err := k.Current(t.Context()); return err },
	}
	all := []error{kms.ErrDenied, kms.ErrWrongKey, kms.ErrKEK, kms.ErrThrottled, kms.ErrCredentials}
	for _, c := range []struct {
		status int
		code   string
		want   error
	}{
		{400, "AccessDeniedException", kms.ErrDenied},
		{400, "InvalidCiphertextException", kms.ErrWrongKey},
		{400, "IncorrectKeyException", kms.ErrWrongKey},
		{400, "DisabledException", kms.ErrKEK},
		{400, "KMSInvalidStateException", kms.ErrKEK},
		{400, "NotFoundException", kms.ErrKEK},
		{400, "InvalidKeyUsageException", kms.ErrKEK},
		{500, "KeyUnavailableException", kms.ErrUnavailable},
		{500, "DependencyTimeoutException", kms.ErrUnavailable},
		{500, "KMSInternalException", kms.ErrUnavailable},
		{503, "ServiceUnavailable", kms.ErrUnavailable},
		{400, "ValidationException", kms.ErrUnavailable},
		{400, "ThrottlingException", kms.ErrThrottled},
		{400, "LimitExceededException", kms.ErrThrottled},
		{400, "ExpiredTokenException", kms.ErrCredentials},
		{400, "UnrecognizedClientException", kms.ErrCredentials},
		{400, "InvalidSignatureException", kms.ErrCredentials},
		{400, "IncompleteSignature", kms.ErrCredentials},
		{400, "MissingAuthenticationTokenException", kms.ErrCredentials},
	} {
		b.proxy.Answer(answer(c.status, c.code))
		for permission, call := range calls {
			err := call()
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.code) {
				t.Errorf("%s on %s: %v, want %v", c.code, permission, err, c.want)
				continue
			}
			for _, other := range all {
				if other != c.want && errors.Is(err, other) {
					t.Errorf("%s on %s: %v is also %v", c.code, permission, err, other)
				}
			}
			if c.want == kms.ErrDenied && !strings.Contains(err.Error(), permission) {
				t.Errorf("the permission %s is not named: %v", permission, err)
			}
			quiet(t, err, key)
		}
	}
}

// quiet demands that an error repeats neither credentials nor a key.
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

func TestAnswersThatCannotBeAreRefused(t *testing.T) {
	b := newBed(t)
	arn, other := b.CreateKey(here), b.CreateKey(here)
	opts := b.options(arn)
	opts.Attempts = 1
	k := open(t, opts)
	key, w := wrapped(t, k)
	reply := func(fields map[string]any) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Type", "application/x-amz-json-1.1")
			_ = json.NewEncoder(w).Encode(fields)
			return true
		}
	}
	for name, c := range map[string]struct {
		fields       map[string]any
		wrap, unwrap error
	}{
		"nothing":           {map[string]any{}, kms.ErrUnavailable, kms.ErrWrongKey},
		"another key":       {map[string]any{"KeyId": other, "Plaintext": make([]byte, 32), "CiphertextBlob": []byte("x")}, kms.ErrUnavailable, kms.ErrWrongKey},
		"a short key":       {map[string]any{"KeyId": arn, "Plaintext": make([]byte, 31)}, kms.ErrUnavailable, kms.ErrWrongKey},
		"no key":            {map[string]any{"KeyId": arn}, kms.ErrUnavailable, kms.ErrWrongKey},
		"a long ciphertext": {map[string]any{"KeyId": arn, "CiphertextBlob": make([]byte, 7000)}, kms.ErrUnavailable, kms.ErrWrongKey},
	} {
		b.proxy.Answer(reply(c.fields))
		if _, err := k.Wrap(t.Context(), binding, key); !errors.Is(err, c.wrap) {
			t.Errorf("wrap, %s: %v", name, err)
		}
		if _, err := k.Unwrap(t.Context(), binding, w); !errors.Is(err, c.unwrap) {
			t.Errorf("unwrap, %s: %v", name, err)
		}
	}
	for _, body := range []string{"<html>hunter2", `{"Plaintext":"hunter2`, `{"Plaintext":7}`, `{"Plaintext":"hunter2!"}`, `[`} {
		b.proxy.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
			fmt.Fprint(w, body)
			return true
		})
		_, err := k.Unwrap(t.Context(), binding, w)
		if !errors.Is(err, kms.ErrUnavailable) || strings.Contains(fmt.Sprintf("%+v", err), "hunter2") {
			t.Errorf("%s: %v", body, err)
		}
		if held := (*smithy.DeserializationError)(nil); errors.As(err, &held) {
			t.Errorf("%s: the error holds the answer", body)
		}
	}
	b.proxy.Answer(reply(map[string]any{"KeyMetadata": map[string]any{"Arn": other, "KeyUsage": "ENCRYPT_DECRYPT", "KeySpec": "SYMMETRIC_DEFAULT", "KeyState": "Enabled"}}))
	if _, err := k.Current(t.Context()); !errors.Is(err, kms.ErrUnavailable) {
		t.Errorf("another key is described: %v", err)
	}
}

func TestAKeyInPlainTextIsRefusedWhereARecipientWasSent(t *testing.T) {
	b := newBed(t)
	arn := b.CreateKey(here)
	b.PublicKey = publicKey
	opts := b.options(arn)
	opts.Attester = &attester{}
	k := open(t, opts)
	_, w := wrapped(t, k)
	b.proxy.Answer(func(w http.ResponseWriter, _ *http.Request) bool {
		_ = json.NewEncoder(w).Encode(map[string]any{"KeyId": arn, "Plaintext": make([]byte, binding.Length)})
		return true
	})
	if _, err := k.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), "plain text") {
		t.Error(err)
	}
	b.proxy.Heal()
	b.PublicKey = func([]byte) (*rsa.PublicKey, error) { return nil, errors.New("no") }
	fails(t, k, w, kms.ErrUnavailable)
	k.opts.Attester = nil
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := k.recipient.key.Clone(); !errors.Is(err, secret.ErrClosed) {
		t.Errorf("the key for answers outlives Close: %v", err)
	}
}

func TestAKeyThatCannotWrapIsNotOpened(t *testing.T) {
	b := newBed(t)
	disabled, leaving := b.CreateKey(here), b.CreateKey(here)
	b.SetState(disabled, "Disabled")
	b.SetState(leaving, "PendingDeletion")
	for name, key := range map[string]string{
		"disabled": disabled, "pending deletion": leaving,
		"for signatures": b.CreateKeyOf("SIGN_VERIFY", "RSA_2048", here), "asymmetric": b.CreateKeyOf("ENCRYPT_DECRYPT", "RSA_2048", here),
		"not there": "alias/none",
	} {
		if _, err := New(t.Context(), b.options(key)); !errors.Is(err, kms.ErrKEK) {
			t.Errorf("%s: %v", name, err)
		}
	}
	arn := b.CreateKey(here)
	k := open(t, b.options(arn))
	key, w := wrapped(t, k)
	b.SetState(arn, "Disabled")
	fails(t, k, w, kms.ErrKEK)
	if _, err := k.Wrap(t.Context(), binding, key); !errors.Is(err, kms.ErrKEK) {
		t.Error(err)
	}
}

func TestCredentialsThatAreWrongOrMissingAreSaid(t *testing.T) {
	b := newBed(t)
	arn := b.CreateKey(here)
	for name, provider := range map[string]awssdk.CredentialsProvider{
		"unknown": sdkcredentials.NewStaticCredentialsProvider("AKIDhunter2-other", "hunter2", ""),
		"forged":  sdkcredentials.NewStaticCredentialsProvider(b.AccessKey, "hunter2", ""),
		"none": awssdk.CredentialsProviderFunc(func(context.Context) (awssdk.Credentials, error) {
			return awssdk.Credentials{}, errors.New("nobody is here")
		}),
	} {
		opts := b.options(arn)
		opts.Credentials = provider
		if _, err := New(t.Context(), opts); !errors.Is(err, kms.ErrCredentials) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	t.Run("nothing in the chain", func(t *testing.T) {
		for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"} {
			t.Setenv(name, "")
		}
		t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
		t.Setenv("AWS_SHARED_CREDENTIALS_FILE", t.TempDir()+"/none")
		t.Setenv("AWS_CONFIG_FILE", t.TempDir()+"/none")
		opts := b.options(arn)
		opts.Credentials = nil
		if _, err := New(t.Context(), opts); !errors.Is(err, kms.ErrCredentials) {
			t.Error(err)
		}
	})
}

func TestAServiceThatDoesNotAnswerIsGivenUp(t *testing.T) {
	b := newBed(t)
	opts := b.options(b.CreateKey(here))
	k := open(t, opts)
	key, w := wrapped(t, k)
	k.opts.Timeout = 50 * time.Millisecond
	opts.Timeout = 50 * time.Millisecond
	defer b.proxy.Stall()()
	for name, call := range map[string]func() error{
		"wrap":    func() error { _, err := k.Wrap(t.Context(), binding, key); return err },
		"unwrap":  func() error { _, err := k.Unwrap(t.Context(), binding, w); return err },
		"current": func() error { _, err := k.Current(t.Context()); return err },
		"new":     func() error { _, err := New(t.Context(), opts); return err },
	} {
		if err := call(); !errors.Is(err, kms.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRetriesAreBounded(t *testing.T) {
	b := newBed(t)
	opts := b.options(b.CreateKey(here))
	opts.Attempts = 3
	k := open(t, opts)
	key, w := wrapped(t, k)
	b.proxy.Answer(answer(500, "KMSInternalException"))
	before := b.proxy.Requests()
	fails(t, k, w, kms.ErrUnavailable)
	if n := b.proxy.Requests() - before; n != 3 {
		t.Errorf("%d attempts", n)
	}
	b.proxy.Heal()
	b.proxy.LoseAnswer(func(*http.Request) bool { return true })
	opens(t, k, w, key)
	before = b.proxy.Requests()
	b.proxy.Answer(answer(400, "AccessDeniedException"))
	fails(t, k, w, kms.ErrDenied)
	if n := b.proxy.Requests() - before; n != 1 {
		t.Errorf("a refusal was asked for %d times", n)
	}
}

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"no key":                            func(o *Options) { o.Key = "" },
		"a key with a path":                 func(o *Options) { o.Key = "key/../x" },
		"an ARN of another service":         func(o *Options) { o.Key = "arn:aws:s3:::x" },
		"a key of another region":           func(o *Options) { o.Key = strings.Replace(o.Key, here, there, 1) },
		"an alias as an old key":            func(o *Options) { o.OldKeys = []string{"alias/x"} },
		"an alias's ARN as an old key":      func(o *Options) { o.OldKeys = []string{"arn:aws:kms:eu-central-1:111122223333:alias/x"} },
		"http to another machine":           func(o *Options) { o.Endpoint = "http://192.0.2.1" },
		"http to a name":                    func(o *Options) { o.Endpoint = "http://localhost" },
		"an endpoint with a user":           func(o *Options) { o.Endpoint = "https://u:hunter2@example.com" },
		"an endpoint that cannot be parsed": func(o *Options) { o.Endpoint = "https://hunter2\x00" },
		"a negative timeout":                func(o *Options) { o.Timeout = -1 },
		"negative attempts":                 func(o *Options) { o.Attempts = -1 },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			opts := b.options(b.CreateKey(here))
			change(&opts)
			if _, err := New(t.Context(), opts); err == nil || strings.Contains(err.Error(), "hunter2") {
				t.Fatal(err)
			}
			if n := b.proxy.Requests(); n != 0 {
				t.Errorf("the service was asked %d times", n)
			}
		})
	}
	t.Run("the environment's endpoint to another machine", func(t *testing.T) {
		t.Setenv("AWS_ENDPOINT_URL_KMS", "http://192.0.2.1")
		b := newBed(t)
		opts := b.options(b.CreateKey(here))
		opts.Endpoint = ""
		if _, err := New(t.Context(), opts); err == nil || !strings.Contains(err.Error(), "loopback") {
			t.Error(err)
		}
		t.Setenv("AWS_ENDPOINT_URL_KMS", b.proxy.URL)
		open(t, opts)
	})
	b := newBed(t)
	opts := b.options(b.CreateKey(here))
	opts.OldKeys = []string{strings.Replace(opts.Key, here, there, 1)}
	if _, err := New(t.Context(), opts); err == nil {
		t.Error("an old key of another region is accepted")
	}
}

// BenchmarkAKey compares this package with the bare calls of the SDK.
func BenchmarkAKey(b *testing.B) {
	s := newBed(b)
	k := open(b, s.options(s.CreateKey(here)))
	_, w := wrapped(b, k)
	kmstest.Bench(b, k, binding, w, kmstest.Bare{Unwrap: func() error {
		_, err := k.client.Decrypt(b.Context(), &service.DecryptInput{KeyId: &k.opts.Key, CiphertextBlob: w.Blob, EncryptionContext: encryptionContext(binding)})
		return err
	}, Generate: func() error {
		_, err := k.client.Encrypt(b.Context(), &service.EncryptInput{KeyId: &k.opts.Key, Plaintext: make([]byte, 32), EncryptionContext: encryptionContext(binding)})
		return err
	}})
}
