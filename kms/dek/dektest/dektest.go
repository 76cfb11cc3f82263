// Package dektest is the suite that every pair of a KMS and a storage passes.
package dektest

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/dek"
	"github.com/keyagent/keyagent/storage"
)

// Bed is one KMS and one storage, at first empty.
type Bed struct {
	// Open opens them as a program does, again each time.
	Open func() (*dek.Store, error)
	// Storage is the same storage in the hands of an attacker.
	Storage interface {
		storage.Storage
		storage.Deleter
	}
}

// Run runs the suite. fresh makes a bed for each test of it.
func Run(t *testing.T, fresh func(t *testing.T) Bed) {
	t.Run("a volume's key comes back in another process", func(t *testing.T) {
		bed := fresh(t)
		for _, length := range []int{kms.MinLength, 32, kms.MaxLength} {
			id := "volume-" + strings.Repeat("x", length)
			first := get(t, bed.open(t), id, length)
			if again := get(t, bed.open(t), id, length); !again.Equal(first) || again.Len() != length {
				t.Errorf("%d bytes: another key came back", length)
			}
		}
	})

	t.Run("each volume has another key", func(t *testing.T) {
		s := fresh(t).open(t)
		if get(t, s, "a", 32).Equal(get(t, s, "b", 32)) {
			t.Fatal("two volumes have one key")
		}
	})

	t.Run("of eight first callers all get one key (case 40)", func(t *testing.T) {
		bed := fresh(t)
		keys := make([]*kms.Secret, 8)
		stores := make([]*dek.Store, len(keys))
		for i := range stores {
			stores[i] = bed.open(t)
		}
		var wg sync.WaitGroup
		for i := range keys {
			wg.Go(func() {
				var err error
				if keys[i], err = stores[i].GetOrCreate(t.Context(), "race", 32); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		for _, k := range keys {
			if k == nil || !k.Equal(keys[0]) {
				t.Fatal("there are two keys")
			}
			defer k.Close()
		}
	})

	t.Run("Get never makes a key", func(t *testing.T) {
		s := fresh(t).open(t)
		if _, err := s.Get(t.Context(), "a", 32); !errors.Is(err, dek.ErrNotFound) {
			t.Fatal(err)
		}
		made := get(t, s, "a", 32)
		if got, err := s.Get(t.Context(), "a", 32); err != nil || !got.Equal(made) {
			t.Fatal(err)
		}
	})

	t.Run("a key of another length is refused", func(t *testing.T) {
		s := fresh(t).open(t)
		get(t, s, "a", 32)
		if _, err := s.GetOrCreate(t.Context(), "a", 64); !errors.Is(err, dek.ErrLength) {
			t.Fatal(err)
		}
		for _, length := range []int{0, 15, 65, -1, 1<<32 - 1} {
			if _, err := s.GetOrCreate(t.Context(), "b", length); !errors.Is(err, kms.ErrBinding) {
				t.Errorf("%d bytes: %v", length, err)
			}
		}
	})

	t.Run("IDs out of bounds are refused (case 31)", func(t *testing.T) {
		s := fresh(t).open(t)
		for _, id := range []string{"", "..", "a/../b", "a/b", "a\x00", "a\n", "dаta", strings.Repeat("a", 1<<20)} {
			if _, err := s.GetOrCreate(t.Context(), id, 32); !errors.Is(err, kms.ErrBinding) {
				t.Errorf("%.20q: %v", id, err)
			}
		}
	})

	t.Run("a wrapped key that was moved, cut, exchanged or lost is refused, and none is made for it (case 41)", func(t *testing.T) {
		bed := fresh(t)
		s, raw := bed.open(t), bed.Storage
		mine := get(t, s, "mine", 32)
		get(t, s, "other", 32)
		object := func(name string) ([]byte, storage.Version) {
			data, v, err := raw.Get(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			return data, v
		}
		good, version := object("deks/mine")
		moved, _ := object("deks/other")
		replace := func(data []byte) {
			v, err := raw.Put(t.Context(), "deks/mine", data, version)
			if err != nil {
				t.Fatal(err)
			}
			version = v
		}
		for name, data := range map[string][]byte{
			"moved": moved, "cut": good[:len(good)-1], "cut in half": good[:len(good)/2], "longer": append(append([]byte(nil), good...), ' '), "empty": {},
		} {
			replace(data)
			for what, call := range map[string]func() (*kms.Secret, error){
				"get":           func() (*kms.Secret, error) { return s.Get(t.Context(), "mine", 32) },
				"get or create": func() (*kms.Secret, error) { return bed.open(t).GetOrCreate(t.Context(), "mine", 32) },
			} {
				if key, err := call(); !errors.Is(err, dek.ErrRefused) {
					t.Errorf("%s: %s: %v, %v", name, what, key, err)
				}
			}
		}
		replace(good)
		if again := get(t, s, "mine", 32); !again.Equal(mine) {
			t.Error("another key came back")
		}
		if err := raw.Delete(t.Context(), "deks/mine", version); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(t.Context(), "mine", 32); !errors.Is(err, dek.ErrNotFound) {
			t.Errorf("lost: %v", err)
		}
		_, v := object("keyservice/record-mac-key")
		if err := raw.Delete(t.Context(), "keyservice/record-mac-key", v); err != nil {
			t.Fatal(err)
		}
		k, err := bed.Open()
		if !errors.Is(err, dek.ErrMACKey) {
			t.Errorf("without the MAC key: %v, %v", k, err)
		}
	})

	t.Run("a cancelled context ends the call", func(t *testing.T) {
		s := fresh(t).open(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := s.GetOrCreate(ctx, "a", 32); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	})
}

// open opens a bed that must open.
func (bed Bed) open(t *testing.T) *dek.Store {
	t.Helper()
	s, err := bed.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func get(t *testing.T, s *dek.Store, id string, length int) *kms.Secret {
	t.Helper()
	key, err := s.GetOrCreate(t.Context(), id, length)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { key.Close() })
	return key
}
