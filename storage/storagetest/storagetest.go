// Package storagetest is the suite that every backend of storage passes.
package storagetest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/framed"
)

// Bed is one storage, at first empty, and what a test can do to it.
type Bed struct {
	// Open returns another instance over the storage each time.
	Open func() storage.Storage
	// Stall makes the service silent until release is called. Nil where there
	// is no service.
	Stall func() (release func())
	// LoseAnswer has the next write carried out, and its answer lost. Nil where
	// there is no service.
	LoseAnswer func()
	// Remove takes the bucket, container or folder away with all that is in it.
	// Nil where there is none.
	Remove func()
	// Plant writes an object that does not come from this package under a
	// name. Nil where the backend has no such thing as a foreign writer.
	Plant func(name string, data []byte)
	// Versions has the service keep what an object was from now on, and returns a function
	// that counts what it keeps of a name beside the present. Nil where it cannot.
	Versions func() func(name string) int
	// Names is how long the longest list is; 0 is 10 000. Less is for a stand-in
	// that takes a time quadratic in it, and still several pages of the service.
	Names int
	// Folders says that a name is either a folder or an object, for a stand-in
	// that keeps objects as files.
	Folders bool
}

// Run runs the suite. fresh makes a bed for each test of it.
func Run(t *testing.T, fresh func(t *testing.T) Bed) {
	t.Run("an object that was put is read back by another instance", func(t *testing.T) {
		open := fresh(t).Open
		v := put(t, open(), "volumes/a", "one", storage.Absent)
		data, got, err := open().Get(t.Context(), "volumes/a")
		if err != nil || string(data) != "one" || got != v {
			t.Fatalf("%q, %q, %v", data, got, err)
		}
	})

	t.Run("what an object was is destroyed, and nothing else", func(t *testing.T) {
		bed := fresh(t)
		kept := func(string) int { return 0 }
		if bed.Versions != nil {
			kept = bed.Versions()
		}
		s := bed.Open()
		names := []string{"a", "a-1", "ab"}
		for _, name := range names {
			v := storage.Absent
			for i := range 4 {
				v = put(t, s, name, fmt.Sprint(i), v)
			}
			if n := kept(name); bed.Versions != nil && n != 3 {
				t.Fatalf("%d earlier versions of %s", n, name)
			}
		}
		n, err := storage.Purge(t.Context(), s, "a")
		if err != nil && (n > 0 || !errors.Is(err, storage.ErrKept)) || n != map[bool]int{true: 3}[bed.Versions != nil] {
			t.Fatal(n, err)
		}
		if again, err := storage.Purge(t.Context(), s, "a"); again != 0 || err != nil && !errors.Is(err, storage.ErrKept) {
			t.Error(again, err)
		}
		for _, name := range names {
			if n := kept(name); bed.Versions != nil && n != map[bool]int{false: 3}[name == "a"] {
				t.Errorf("%d earlier versions of %s", n, name)
			}
			if data, _, err := s.Get(t.Context(), name); err != nil || string(data) != "3" {
				t.Errorf("%s: %q, %v", name, data, err)
			}
		}
	})

	t.Run("an absent object is not found", func(t *testing.T) {
		if _, _, err := fresh(t).Open().Get(t.Context(), "nothing"); !errors.Is(err, storage.ErrNotFound) {
			t.Fatal(err)
		}
	})

	t.Run("a write that expects another version changes nothing", func(t *testing.T) {
		s := fresh(t).Open()
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
		open := fresh(t).Open
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
		s := fresh(t).Open()
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
		bed := fresh(t)
		s := bed.Open()
		var want []string
		for i := range 25 {
			name := fmt.Sprintf("volumes/v%03d", i)
			want = append(want, name)
			put(t, s, name, "x", storage.Absent)
		}
		if !bed.Folders {
			put(t, s, "volumes", "an object beside the folder of its name", storage.Absent)
		}
		put(t, s, "w", "x", storage.Absent)
		if got := list(t, s, "volumes/", 7); !slices.Equal(got, want) {
			t.Fatalf("got %v", got)
		}
		for _, limit := range []int{0, -1} {
			if got, err := s.List(t.Context(), "volumes/", "", limit); err != nil || len(got) != 0 {
				t.Errorf("limit %d: %v, %v", limit, got, err)
			}
		}
	})

	t.Run("a long list of names comes in pages", func(t *testing.T) {
		bed := fresh(t)
		s := bed.Open()
		want := make([]string, cmp.Or(bed.Names, 10_000))
		names := make(chan string)
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for name := range names {
					put(t, s, name, "x", storage.Absent)
				}
			})
		}
		for i := range want {
			want[i] = fmt.Sprintf("volumes/v%05d", i)
			names <- want[i]
		}
		close(names)
		wg.Wait()
		for _, page := range []int{999, len(want) + 1} {
			if got := list(t, s, "volumes/", page); !slices.Equal(got, want) {
				t.Errorf("pages of %d: %d names", page, len(got))
			}
		}
	})

	t.Run("a deleted object is gone, and its version is not used again", func(t *testing.T) {
		s := fresh(t).Open()
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
		s := fresh(t).Open()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for name, call := range calls(s) {
			if err := call(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})

	t.Run("a context that is cancelled in the middle of a call ends it", func(t *testing.T) {
		bed := fresh(t)
		if bed.Stall == nil {
			t.Log("this backend asks no service")
			return
		}
		s := bed.Open()
		defer bed.Stall()()
		for name, call := range calls(s) {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(50*time.Millisecond, cancel)
			if err := call(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, storage.ErrNotFound) || errors.Is(err, storage.ErrConflict) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})

	t.Run("a write whose answer is lost is known again as ours (case 42)", func(t *testing.T) {
		bed := fresh(t)
		if bed.LoseAnswer == nil {
			t.Log("this backend asks no service")
			return
		}
		s := bed.Open()
		v := storage.Absent
		for _, data := range []string{"created", "changed"} {
			bed.LoseAnswer()
			next, err := s.Put(t.Context(), "a", []byte(data), v)
			if err != nil {
				// Also fine, if it is neither success nor a conflict, which
				// would mean that somebody else had written.
				if errors.Is(err, storage.ErrConflict) {
					t.Fatalf("%s: our own write was taken for another's: %v", data, err)
				}
				if _, next, err = s.Get(t.Context(), "a"); err != nil {
					t.Fatal(err)
				}
			}
			got, have, err := s.Get(t.Context(), "a")
			if err != nil || string(got) != data || have != next {
				t.Fatalf("%q, %q, %v, want %q, %q", got, have, err, data, next)
			}
			v = next
		}
	})

	t.Run("a bucket that is gone is not an object that is absent", func(t *testing.T) {
		bed := fresh(t)
		if bed.Remove == nil {
			t.Log("this backend has no bucket")
			return
		}
		s := bed.Open()
		v := put(t, s, "a", "one", storage.Absent)
		bed.Remove()
		for name, call := range calls(s) {
			if err := call(t.Context()); !errors.Is(err, storage.ErrNoBucket) || errors.Is(err, storage.ErrNotFound) || errors.Is(err, storage.ErrConflict) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := s.Put(t.Context(), "a", nil, v); !errors.Is(err, storage.ErrNoBucket) {
			t.Errorf("change: %v", err)
		}
	})

	t.Run("what others wrote is corrupt, never absent, and is not overwritten", func(t *testing.T) {
		bed := fresh(t)
		if bed.Plant == nil {
			t.Log("this backend has no foreign writers")
			return
		}
		s := bed.Open()
		framed, _ := framed.Frame([]byte("data of some length"))
		for name, body := range map[string][]byte{
			"empty": {}, "foreign": []byte("hello\nworld"), "truncated": framed[:len(framed)-1], "longer": append(bytes.Clone(framed), 0),
			"header": framed[:30], "endless": make([]byte, 1<<20),
		} {
			bed.Plant("planted-"+name, body)
			_, _, err := s.Get(t.Context(), "planted-"+name)
			if !errors.Is(err, storage.ErrCorrupt) && !(name == "endless" && errors.Is(err, storage.ErrTooLarge)) {
				t.Errorf("%s: get: %v", name, err)
			}
			if _, err := s.Put(t.Context(), "planted-"+name, []byte("new"), storage.Absent); err == nil {
				t.Errorf("%s: it was overwritten", name)
			}
		}
	})
}

// calls are one of each.
func calls(s storage.Storage) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"put":  func(ctx context.Context) error { _, err := s.Put(ctx, "new", []byte("x"), storage.Absent); return err },
		"get":  func(ctx context.Context) error { _, _, err := s.Get(ctx, "a"); return err },
		"list": func(ctx context.Context) error { _, err := s.List(ctx, "", "", 10); return err },
	}
}

// list lists in pages to the end.
func list(t *testing.T, s storage.Storage, prefix string, limit int) (all []string) {
	t.Helper()
	for after := ""; ; {
		page, err := s.List(t.Context(), prefix, after, limit)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			return all
		}
		if len(page) > limit {
			t.Fatalf("a page of %d", len(page))
		}
		all = append(all, page...)
		after = page[len(page)-1]
	}
}

func put(t *testing.T, s storage.Storage, name, data string, expect storage.Version) storage.Version {
	t.Helper()
	v, err := s.Put(t.Context(), name, []byte(data), expect)
	if err != nil {
		t.Errorf("put %s: %v", name, err) // also called by goroutines
	}
	return v
}
