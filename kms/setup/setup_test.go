package setup

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/kms"
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
