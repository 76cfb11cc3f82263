package aws

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"os"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/test/sim/cloud/awskms"
)

// plain is what the vectors of testdata hold.
const plain = "0123456789abcdef0123456789abcdef"

func vector(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestWhatOpenSSLEncryptsOpens: the vectors come from openssl cms -encrypt
// -aes-256-cbc -keyid with OAEP and SHA-256, with -stream (indefinite lengths) and
// without.
func TestWhatOpenSSLEncryptsOpens(t *testing.T) {
	for _, name := range []string{"openssl.cms", "openssl-der.cms"} {
		e, err := parseEnveloped(vector(t, name))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		key, err := e.open(vector(t, "recipient.pkcs8"), len(plain))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		want, err := secret.From([]byte(plain))
		if err != nil || !key.Equal(want) {
			t.Errorf("%s: another key, %v", name, err)
		}
	}
}

func TestAnEnvelopeThatWasChangedNeverPanicsAndKeepsItsForm(t *testing.T) {
	der := vector(t, "recipient.pkcs8")
	sound := vector(t, "openssl.cms")
	for i := range sound {
		for _, bit := range []byte{1, 0x80} {
			bad := bytes.Clone(sound)
			bad[i] ^= bit
			if e, err := parseEnveloped(bad); err == nil && (len(e.key) != 256 || len(e.iv) != 16) {
				t.Fatalf("byte %d: a form that cannot be", i)
			}
		}
		if _, err := parseEnveloped(sound[:i]); err == nil {
			t.Errorf("%d bytes of it are taken for all", i)
		}
	}
	if _, err := parseEnveloped(append(bytes.Clone(sound), 0)); err == nil {
		t.Error("something follows it")
	}
	if _, err := parseEnveloped(make([]byte, 7000)); err == nil {
		t.Error("it is longer than the service allows")
	}
	nested := bytes.Repeat([]byte{0x30, 0x80}, 1000)
	if _, err := parseEnveloped(nested); err == nil {
		t.Error("it has no bottom")
	}
	e, err := parseEnveloped(sound)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.open(der, len(plain)-1); err == nil {
		t.Error("a key of another length")
	}
	e.content = e.content[:16] // its padding was in the end
	if _, err := e.open(der, 16); err == nil {
		t.Error("without its padding")
	}
	e.key = bytes.Clone(e.key)
	e.key[5] ^= 1
	if _, err := e.open(der, len(plain)); err == nil {
		t.Error("for another recipient")
	}
}

func FuzzAnEnvelope(f *testing.F) {
	f.Add(vector(f, "openssl.cms"))
	f.Add(vector(f, "openssl-der.cms"))
	key, err := x509.ParsePKCS8PrivateKey(vector(f, "recipient.pkcs8"))
	if err != nil {
		f.Fatal(err)
	}
	der, err := awskms.Envelop(&key.(*rsa.PrivateKey).PublicKey, []byte(plain))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	content := make([]byte, 32)
	rand.Read(content)
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := parseEnveloped(data)
		if err != nil {
			return
		}
		if len(e.key) != 256 || len(e.iv) != 16 || len(e.content) == 0 || len(e.content)%16 != 0 {
			t.Fatal("a form that cannot be")
		}
		if p, err := e.decrypt(content); err == nil && (len(p) >= len(e.content) || len(p) < len(e.content)-16) {
			t.Fatal("padding that cannot be")
		}
	})
}
