// Package storagetest is the suite that every backend of storage passes.
package storagetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/keyagent/keyagent/storage"
)

// Run runs the suite. open returns a new instance over one and the same,
// at first empty, storage each time it is called within one test.
func Run(t *testing.T, fresh func(t *testing.T) (open func() storage.Storage)) {
	t.Run("an object that was put is read back by another instance", func(t *testing.T) {
		open := fresh(t)
		v := put(t, open(), "volumes/a", "one", storage.Absent)
		data, got, err := open().Get(t.Context(), "volumes/a")
		if err != nil || string(data) != "one" || got != v {
			t.Fatalf("%q, %q, %v", data, got, err)
		}
	})

	t.Run("an absent object is not found", func(t *testing.T) {
		if _, _, err := fresh(t)().Get(t.Context(), "nothing"); !errors.Is(err, storage.ErrNotFound) {
			t.Fatal(err)
		}
	})

	t.Run("a write that expects another version changes nothing", func(t *testing.T) {
		s := fresh(t)()
		v1 := put(t, s, "a", "one", storage.Absent)
		v2 := put(t, s, "a", "two", v1)
		v3 := put(t, s, "a", "one", v2) // the first content again: no version comes twice
		for _, stale := range []storage.Version{storage.Absent, v1, v2, "x"} {
			if _, err := s.Put(t.Context(), "a", []byte("lost"), stale); !errors.Is(err, storage.ErrConflict) {
				t.Errorf("expecting %q: %v", stale, err)
			}
		}
		if data, v, err := s.Get(t.Context(), "a"); err != nil || string(data) != "one" || v != v3 {
			t.Fatalf("%q, %q, %v", data, v, err)
		}
		if _, err := s.Put(t.Context(), "b", nil, v1); !errors.Is(err, storage.ErrConflict) {
			t.Fatalf("an absent object in some version: %v", err)
		}
	})

	t.Run("of eight first writers exactly one succeeds", func(t *testing.T) {
		open := fresh(t)
		var won atomic.Int32
		var wg sync.WaitGroup
		for i := range 8 {
			s := open()
			wg.Go(func() {
				_, err := s.Put(t.Context(), "race", []byte{byte(i)}, storage.Absent)
				switch {
				case err == nil:
					won.Add(1)
				case !errors.Is(err, storage.ErrConflict):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Fatalf("%d writers succeeded", won.Load())
		}
	})

	t.Run("names and sizes out of bounds are refused", func(t *testing.T) {
		s := fresh(t)()
		for _, name := range []string{"", "/", "a/", "/a", "a//b", "../a", "a/../b", "a/..", ".a", "a/.b", "a\x00b", "a\nb", "é", strings.Repeat("a", 256), strings.Repeat("a", 1<<20)} {
			if _, err := s.Put(t.Context(), name, nil, storage.Absent); !errors.Is(err, storage.ErrName) {
				t.Errorf("put %.20q: %v", name, err)
			}
			if _, _, err := s.Get(t.Context(), name); !errors.Is(err, storage.ErrName) {
				t.Errorf("get %.20q: %v", name, err)
			}
		}
		if _, err := s.Put(t.Context(), "a", make([]byte, storage.MaxObject+1), storage.Absent); !errors.Is(err, storage.ErrTooLarge) {
			t.Errorf("too large: %v", err)
		}
		largest := bytes.Repeat([]byte("\n\x00"), storage.MaxObject/2)
		put(t, s, "largest", string(largest), storage.Absent)
		if data, _, err := s.Get(t.Context(), "largest"); err != nil || !bytes.Equal(data, largest) {
			t.Errorf("the largest object: %d bytes, %v", len(data), err)
		}
		put(t, s, "empty", "", storage.Absent)
		if data, v, err := s.Get(t.Context(), "empty"); err != nil || len(data) != 0 || v == storage.Absent {
			t.Errorf("the empty object: %q, %v", data, err)
		}
	})

	t.Run("names are listed in order and in pages", func(t *testing.T) {
		s := fresh(t)()
		var want []string
		for i := range 25 {
			name := fmt.Sprintf("volumes/v%03d", i)
			want = append(want, name)
			put(t, s, name, "x", storage.Absent)
		}
		put(t, s, "volumes", "an object beside the folder of its name", storage.Absent)
		put(t, s, "w", "x", storage.Absent)
		var got []string
		for after := ""; ; {
			page, err := s.List(t.Context(), "volumes/", after, 7)
			if err != nil {
				t.Fatal(err)
			}
			if len(page) == 0 {
				break
			}
			if len(page) > 7 {
				t.Fatalf("a page of %d", len(page))
			}
			got = append(got, page...)
			after = page[len(page)-1]
		}
		if !slices.Equal(got, want) {
			t.Fatalf("got %v", got)
		}
	})

	t.Run("a deleted object is gone, and its version is not used again", func(t *testing.T) {
		s := fresh(t)()
		d, ok := s.(storage.Deleter)
		if !ok {
			t.Log("this backend does not delete")
			return
		}
		v := put(t, s, "a", "one", storage.Absent)
		if err := d.Delete(t.Context(), "a", "x"); !errors.Is(err, storage.ErrConflict) {
			t.Fatalf("another version: %v", err)
		}
		if err := d.Delete(t.Context(), "a", v); err != nil {
			t.Fatal(err)
		}
		if err := d.Delete(t.Context(), "a", v); !errors.Is(err, storage.ErrNotFound) {
			t.Fatalf("twice: %v", err)
		}
		if again := put(t, s, "a", "one", storage.Absent); again == v {
			t.Fatal("the version came back")
		}
	})

	t.Run("a cancelled context ends the call", func(t *testing.T) {
		s := fresh(t)()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := s.Put(ctx, "a", nil, storage.Absent); !errors.Is(err, context.Canceled) {
			t.Errorf("put: %v", err)
		}
		if _, _, err := s.Get(ctx, "a"); !errors.Is(err, context.Canceled) {
			t.Errorf("get: %v", err)
		}
	})
}

func put(t *testing.T, s storage.Storage, name, data string, expect storage.Version) storage.Version {
	t.Helper()
	v, err := s.Put(t.Context(), name, []byte(data), expect)
	if err != nil {
		t.Fatalf("put %s: %v", name, err)
	}
	return v
}
