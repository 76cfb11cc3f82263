package azurevault

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"
)

// TestKeyWrapIsThatOfRFC3394: section 4.6, 256 bits under a KEK of 256 bits.
func TestKeyWrapIsThatOfRFC3394(t *testing.T) {
	unhex := func(s string) []byte {
		p, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	kek := unhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
	key := unhex("00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f")
	want := unhex("28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21")
	got, err := wrapAES(kek, key)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%x, %v", got, err)
	}
	if back, err := unwrapAES(kek, got); err != nil || !bytes.Equal(back, key) {
		t.Errorf("%x, %v", back, err)
	}
	got[9] ^= 1
	if _, err := unwrapAES(kek, got); err == nil {
		t.Error("a changed one opens")
	}
}

// TestItsAnswersAreThoseOfTheOfficialTypes: what the types of the SDK read and
// write again is all that was there.
func TestItsAnswersAreThoseOfTheOfficialTypes(t *testing.T) {
	v := &Vault{Host: "tests.vault.azure.net", Accepts: func(token string) bool { return token == "t" }}
	if err := v.CreateKey("kek", "RSA"); err != nil {
		t.Fatal(err)
	}
	ask := func(method, path, body string) []byte {
		r := httptest.NewRequest(method, "https://"+v.Host+path+"?api-version=2025-07-01", strings.NewReader(body))
		r.Header.Set("Authorization", "Bearer t")
		w := httptest.NewRecorder()
		v.ServeHTTP(w, r)
		if w.Code != 200 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
		return w.Body.Bytes()
	}
	same := func(data []byte, into any) {
		t.Helper()
		if err := json.Unmarshal(data, into); err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(into)
		if err != nil {
			t.Fatal(err)
		}
		var before, after any
		_ = json.Unmarshal(data, &before)
		_ = json.Unmarshal(again, &after)
		if !reflect.DeepEqual(before, after) {
			t.Errorf("%s became %s", data, again)
		}
	}
	var bundle azkeys.KeyBundle
	same(ask("GET", "/keys/kek/", ""), &bundle)
	if bundle.Key.KID.Name() != "kek" || len(bundle.Key.KID.Version()) != 32 || len(bundle.Key.N) != 256 || len(bundle.Key.KeyOps) != 4 || bundle.Attributes.Created.IsZero() {
		t.Errorf("fields are missing: %+v", bundle)
	}
	var result azkeys.KeyOperationResult
	same(ask("POST", "/keys/kek//wrapkey", `{"alg":"RSA-OAEP-256","value":"AAAA"}`), &result)
	if len(result.Result) != 256 || *result.KID != *bundle.Key.KID {
		t.Errorf("fields are missing: %+v", result)
	}
}
