package setuptest

import (
	"errors"
	"testing"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/setup"
)

// wraps is a KMS whose keys are random, so that they come back from storage or not at all.
const wraps = "kms://command?command=printf%200123456789abcdef"

func key(t *testing.T, storage, id string) *kms.Secret {
	t.Helper()
	keys, err := DEKs(t, wraps, storage)
	if err != nil {
		t.Fatal(err)
	}
	k, err := keys.GetOrCreate(t.Context(), id, setup.SymmetricKeyLength)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func TestATestHasOneMemory(t *testing.T) {
	first := key(t, "storage://memory", "volume-1")
	if !key(t, "storage://memory", "volume-1").Equal(first) {
		t.Error("a program that starts again has another key")
	}
	if key(t, "storage://memory?name=other", "volume-1").Equal(first) {
		t.Error("two storages are one")
	}
	t.Run("another test", func(t *testing.T) {
		if key(t, "storage://memory", "volume-1").Equal(first) {
			t.Error("two tests share a memory")
		}
	})
	if !key(t, "storage://file?dir="+t.TempDir(), "volume-1").Equal(first) {
		return
	}
	t.Error("a folder is the memory")
}

func TestNoProgramCanChooseTheMemory(t *testing.T) {
	if _, err := setup.Storage(t.Context(), "storage://memory"); !errors.Is(err, kms.ErrURI) {
		t.Error(err)
	}
	if _, err := setup.DEKs(t.Context(), wraps, "storage://memory"); !errors.Is(err, kms.ErrURI) {
		t.Error(err)
	}
	for _, uri := range []string{"storage://memory?size=1", "storage://memory2", "storage://memory:1"} {
		if _, err := DEKs(t, wraps, uri); !errors.Is(err, kms.ErrURI) {
			t.Errorf("%s: %v", uri, err)
		}
	}
}
