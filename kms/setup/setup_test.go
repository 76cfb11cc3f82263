package setup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/dek"
)

// Case 46: a parameter that is unknown, missing or contradicts another is
// refused, and no error repeats a value.
func TestWhatABackendDoesNotKnowIsRefused(t *testing.T) {
	master := filepath.Join(t.TempDir(), "hunter2")
	if err := os.WriteFile(master, make([]byte, 32), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, uri := range map[string]string{
		"another backend":              "kms://clusterkms?file=hunter2",
		"storage for a KMS":            "storage://file?dir=hunter2",
		"no master secret":             "kms://cluster-kms",
		"an empty master secret":       "kms://cluster-kms?file=",
		"two master secrets":           "kms://cluster-kms?file=hunter2&credential=hunter2",
		"a misspelt parameter":         "kms://cluster-kms?file=hunter2&slat=hunter2",
		"the secret itself":            "kms://cluster-kms?secret=hunter2",
		"a derivation that is unknown": "kms://cluster-kms?file=hunter2&derivation=hunter2",
		"a key that is not base64":     "kms://cluster-kms?key=hunter2!",
		"a salt that is not base64":    "kms://cluster-kms?file=hunter2&salt=hunter2!",
		"no salt of Constellation":     "kms://cluster-kms?key=aHVudGVyMmh1bnRlcjJodW50ZXIy&derivation=constellation",
		"a salt that is none":          "kms://cluster-kms?key=aHVudGVyMmh1bnRlcjJodW50ZXIy&derivation=constellation&noSalt=hunter2",
		"a salt and none":              "kms://cluster-kms?key=aHVudGVyMmh1bnRlcjJodW50ZXIy&derivation=constellation&noSalt=true&salt=aaaa",
		"two salts":                    "kms://cluster-kms?file=hunter2&salt=aaaa&saltFile=hunter2",
		"a salt beside its own":        "kms://cluster-kms?constellationFile=hunter2&salt=aaaa",
		"a duration that is none":      "kms://command?command=true&cache=hunter2",
		"no token":                     "kms://vault?address=https://hunter2&key=k&caFile=hunter2",
		"no authority":                 "kms://vault?address=https://hunter2&key=k&tokenFile=hunter2",
	} {
		t.Run(name, func(t *testing.T) {
			k, err := KMS(t.Context(), uri)
			if !errors.Is(err, kms.ErrURI) || k != nil {
				t.Fatalf("%v, %v", k, err)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error repeats a value: %v", err)
			}
		})
	}
	for name, uri := range map[string]string{
		"another backend": "storage://memfs", "a KMS for storage": "kms://cluster-kms?file=hunter2", "no folder": "storage://file",
		"an unknown parameter": "storage://file?dir=/tmp&mode=hunter2",
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Storage(t.Context(), uri)
			if !errors.Is(err, kms.ErrURI) || s != nil || strings.Contains(err.Error(), "hunter2") {
				t.Fatalf("%v, %v", s, err)
			}
		})
	}
	for name, text := range map[string]string{
		"no JSON": "hunter2", "another field": `{"key":"aHVudGVyMmh1bnRlcjI=","salt":"","more":"hunter2"}`, "no key": `{"salt":"aHVudGVyMg=="}`,
		"not base64": `{"key":"hunter2!"}`, "more behind it": `{"key":"aHVudGVyMmh1bnRlcjI="}{}`,
	} {
		path := filepath.Join(t.TempDir(), "master.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		k, err := KMS(t.Context(), "kms://cluster-kms?constellationFile="+path)
		if err == nil || k != nil || strings.Contains(err.Error(), "unter2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	k, err := KMS(t.Context(), "kms://cluster-kms?file="+master)
	if err != nil {
		t.Fatal(err)
	}
	k.Close()
	s, err := Storage(t.Context(), "storage://file?dir="+filepath.Join(t.TempDir(), "records"))
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

// Case 46: what was meant to be a parameter and is not is not repeated either.
func TestATypoInAURIShowsNoSecret(t *testing.T) {
	for _, uri := range []string{
		"kms://cluster-kms&key=hunter2", "kms://cluster-kms;key=hunter2", "kms://hunter2:x@aws?keyName=k", "kms://aws#accessKey=hunter2",
		"kms://aws/accessKey=hunter2", "kms://aws%3FaccessKey=hunter2", "storage://aws&accessKey=hunter2", "hunter2", "kms://hunter2",
	} {
		_, err := KMS(t.Context(), uri)
		_, storageErr := Storage(t.Context(), uri)
		for _, text := range []string{fmt.Sprint(err), fmt.Sprint(storageErr), Redact(uri)} {
			if strings.Contains(text, "hunter2") && uri != "kms://hunter2" {
				t.Errorf("%s: %s", uri, text)
			}
		}
	}
	if got := Redact("kms://aws?keyName=hunter2"); got != "kms://aws" {
		t.Error(got)
	}
}

func TestAURIThatHoldsASecretIsKnown(t *testing.T) {
	for uri, want := range map[string]string{
		"kms://cluster-kms?key=x": "key", "kms://vault?key=x": "", "kms://cluster-kms?file=x": "", "nonsense": "",
		"storage://aws?bucket=b&accessKey=x": "accessKey", "storage://aws?bucket=b&accessKeyFile=x": "", "kms://aws?sessionToken=x": "sessionToken",
		"kms://azure?clientSecret=x": "clientSecret", "storage://etcd?password=x": "password",
	} {
		name, instead := HoldsSecret(uri)
		if name != want || (name == "") != (instead == "") {
			t.Errorf("%s: %q, %q", uri, name, instead)
		}
	}
}

func TestNoStorageIsForKMSesThatDerive(t *testing.T) {
	master := filepath.Join(t.TempDir(), "master")
	if err := os.WriteFile(master, make([]byte, 32), 0o600); err != nil {
		t.Fatal(err)
	}
	keys, err := DEKs(t.Context(), "kms://cluster-kms?file="+master, "storage://no-store")
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	key, err := keys.GetOrCreate(t.Context(), "a", 32)
	if err != nil {
		t.Fatal(err)
	}
	key.Close()
	if _, err := DEKs(t.Context(), "kms://cluster-kms?file="+master, "storage://no-store?dir=x"); !errors.Is(err, kms.ErrURI) {
		t.Error(err)
	}
	if s, err := Storage(t.Context(), "storage://no-store"); !errors.Is(err, kms.ErrURI) || s != nil {
		t.Error(err)
	}
	wraps, err := DEKs(t.Context(), "kms://command?command=printf%200123456789abcdef", "storage://no-store")
	if err != nil {
		t.Fatal(err)
	}
	defer wraps.Close()
	if _, err := wraps.GetOrCreate(t.Context(), "a", 32); !errors.Is(err, dek.ErrNoStorage) {
		t.Error(err)
	}
}
