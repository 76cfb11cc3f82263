package maa

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"os"
	"testing"
)

// FuzzAnswer: what a provider answers is parsed to parts of the right sizes, or
// refused, and never opens with a key that nobody used.
func FuzzAnswer(f *testing.F) {
	inner, err := json.Marshal(map[string]any{
		"Jwt": []byte("text"), "AuthenticationData": make([]byte, tagSize), "EncryptedInnerKey": make([]byte, innerKeySize),
		"EncryptionParams": map[string]any{"Iv": make([]byte, ivSize)},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"token":"` + base64.RawURLEncoding.EncodeToString(inner) + `"}`))
	f.Add([]byte(`{"token":"e30"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := parseAnswer(data)
		if err != nil {
			return
		}
		if len(a.EncryptedInnerKey) != innerKeySize || len(a.EncryptionParams.IV) != ivSize || len(a.AuthenticationData) != tagSize {
			t.Fatalf("%+v", a)
		}
		if token, err := a.open(make([]byte, 31)); err == nil {
			t.Fatalf("opened to %q", token)
		}
		if token, err := a.open(bytes.Repeat([]byte{7}, 32)); err == nil {
			t.Fatalf("opened to %q", token)
		}
	})
}

// FuzzCertificates: what the host answers is PEM, or refused.
func FuzzCertificates(f *testing.F) {
	const one = "-----BEGIN CERTIFICATE-----\\nAAAA\\n-----END CERTIFICATE-----\\n"
	f.Add([]byte(`{"vcekCert":"` + one + `","certificateChain":"` + one + one + `"}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if pem, err := parseCertificates(data); err == nil && bytes.Count(pem, []byte("-----BEGIN CERTIFICATE-----")) < 2 {
			t.Fatalf("%q", pem)
		}
	})
}

// FuzzStripLog: what is left of a log has nothing more to lose.
func FuzzStripLog(f *testing.F) {
	log, err := os.ReadFile(bootLog)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(log)
	f.Fuzz(func(t *testing.T, data []byte) {
		once, err := stripLog(data)
		if err != nil {
			return
		}
		twice, err := stripLog(once)
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%x, then %x, %v", once, twice, err)
		}
	})
}
