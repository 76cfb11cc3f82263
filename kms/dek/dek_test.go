package dek_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/kms/dek"
	"github.com/keyagent/keyagent/kms/dek/dektest"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/memfs"
)

func newKMS() (*cluster.KMS, error) {
	master, err := kms.NewSecret([]byte("0123456789abcdef0123456789abcdef"))
	if err != nil {
		return nil, err
	}
	defer master.Close()
	return cluster.New(cluster.Options{MasterSecret: master})
}

// wrapping is a KMS that cannot derive.
type wrapping struct{ *cluster.KMS }

func (w wrapping) Generate(ctx context.Context, b kms.Binding) (*kms.Secret, kms.Wrapped, error) {
	return backend.Generate(ctx, b, w.Wrap)
}

func open(t *testing.T, s storage.Storage, wraps bool) *dek.Store {
	t.Helper()
	d, err := openErr(t.Context(), s, wraps)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func openErr(ctx context.Context, s storage.Storage, wraps bool) (*dek.Store, error) {
	k, err := newKMS()
	if err != nil {
		return nil, err
	}
	if wraps {
		return dek.Open(ctx, wrapping{k}, s)
	}
	return dek.Open(ctx, k, s)
}

func TestTheSuiteHoldsForAKMSThatDerivesAndForOneThatWraps(t *testing.T) {
	for name, wraps := range map[string]bool{"derives": false, "wraps": true} {
		t.Run(name, func(t *testing.T) {
			dektest.Run(t, func(t *testing.T) dektest.Bed {
				s := memfs.New()
				return dektest.Bed{Open: func() (*dek.Store, error) { return openErr(t.Context(), s, wraps) }, Storage: s}
			})
		})
	}
}

func TestWithoutAStorageOnlyAKMSThatDerivesWorks(t *testing.T) {
	first, err := open(t, nil, false).GetOrCreate(t.Context(), "data", 32)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	again, err := open(t, nil, false).Get(t.Context(), "data", 32)
	if err != nil || !again.Equal(first) {
		t.Fatalf("another key came back, %v", err)
	}
	if _, err := open(t, nil, true).GetOrCreate(t.Context(), "data", 32); !errors.Is(err, dek.ErrNoStorage) {
		t.Fatal(err)
	}
}

// A program that has a KMS and a storage asks for a volume's key.
func Example() {
	ctx := context.Background()
	k, err := newKMS() // programs use setup.DEKs, with two URIs
	if err != nil {
		fmt.Println(err)
		return
	}
	keys, err := dek.Open(ctx, k, memfs.New())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer keys.Close()
	key, err := keys.GetOrCreate(ctx, "pvc-8f2a", 32)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer key.Close()
	_ = key.Use(func(b []byte) error {
		fmt.Println(len(b), "bytes")
		return nil
	})
	// Output: 32 bytes
}
