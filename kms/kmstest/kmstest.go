// Package kmstest is the suite that every backend of kms passes.
package kmstest

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
)

// Bed is a KEK, another one, and what a test can do to them.
type Bed struct {
	// Open returns a KMS over one and the same KEK each time it is called.
	Open func(t *testing.T) kms.KMS
	// Other returns one over another KEK of the same service.
	Other func(t *testing.T) kms.KMS
	// Rotate gives the KEK of Open a new version; older ones still open. Nil
	// where a KEK has no versions that a client sees.
	Rotate func(t *testing.T)
	// Stall makes the service silent until release is called. Nil where no
	// service is asked.
	Stall func(t *testing.T) (release func())
}

// Run runs the suite.
func Run(t *testing.T, bed Bed) {
	open, other := bed.Open, bed.Other
	b := kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 1, Length: 32}

	t.Run("a generated key comes back by its wrapped form, also from a new instance", func(t *testing.T) {
		key, w := generate(t, open(t), b)
		got, err := open(t).Unwrap(t.Context(), b, w)
		if err != nil {
			t.Fatal(err)
		}
		if !got.Equal(key) || got.Len() != b.Length {
			t.Fatal("another key came back")
		}
	})

	t.Run("a key from elsewhere is wrapped and comes back", func(t *testing.T) {
		key, err := secret.Random(b.Length)
		if err != nil {
			t.Fatal(err)
		}
		w, err := open(t).Wrap(t.Context(), b, key)
		if err != nil {
			t.Fatal(err)
		}
		got, err := open(t).Unwrap(t.Context(), b, w)
		if err != nil || !got.Equal(key) {
			t.Fatalf("another key came back, %v", err)
		}
		short, _ := secret.Random(b.Length - 1)
		if _, err := open(t).Wrap(t.Context(), b, short); !errors.Is(err, kms.ErrBinding) {
			t.Fatalf("a key of another length: %v", err)
		}
	})

	t.Run("another binding never gives the same key (associated data, case 41)", func(t *testing.T) {
		k := open(t)
		imported, err := secret.Random(b.Length)
		if err != nil {
			t.Fatal(err)
		}
		wi, err := k.Wrap(t.Context(), b, imported)
		if err != nil {
			t.Fatal(err)
		}
		key, wg := generate(t, k, b)
		for name, change := range map[string]func(*kms.Binding){
			"volume":  func(b *kms.Binding) { b.VolumeID = "data-2" },
			"purpose": func(b *kms.Binding) { b.Purpose = kms.RecordMAC },
			"version": func(b *kms.Binding) { b.Version = 2 },
			"longer":  func(b *kms.Binding) { b.Length = 33 }, // size mismatch
			"shorter": func(b *kms.Binding) { b.Length = 16 },
			"salt":    func(b *kms.Binding) { b.Salt = kms.NewSalt() },
		} {
			swapped := b
			change(&swapped)
			if got, err := k.Unwrap(t.Context(), swapped, wi); !errors.Is(err, kms.ErrWrongKey) {
				t.Errorf("%s: a wrapped key opened under another binding: %v, %v", name, got, err)
			}
			if got, err := k.Unwrap(t.Context(), swapped, wg); err == nil && got.Equal(key) {
				t.Errorf("%s: the same key under another binding", name)
			}
		}
	})

	t.Run("a salt is part of what a key is for, and two give two keys", func(t *testing.T) {
		k := open(t)
		one, two := b, b
		one.Salt, two.Salt = kms.NewSalt(), kms.NewSalt()
		key, w := generate(t, k, one)
		other, _ := generate(t, k, two)
		plain, _ := generate(t, k, b)
		if key.Equal(other) || key.Equal(plain) {
			t.Error("the same key for another salt, or for none")
		}
		if got, err := open(t).Unwrap(t.Context(), one, w); err != nil || !got.Equal(key) {
			t.Errorf("it does not come back: %v", err)
		}
		for name, wrong := range map[string]kms.Binding{"another": two, "none": b} {
			if got, err := k.Unwrap(t.Context(), wrong, w); err == nil && got.Equal(key) {
				t.Errorf("%s salt gives the key", name)
			}
		}
		for name, salt := range map[string]string{"short": "aa", "capitals": strings.ToUpper(one.Salt), "not hex": strings.Repeat("x", 64)} {
			bad := b
			bad.Salt = salt
			if _, _, err := k.Generate(t.Context(), bad); !errors.Is(err, kms.ErrBinding) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})

	t.Run("another KEK does not open it", func(t *testing.T) {
		k := open(t)
		key, w := generate(t, k, b)
		if _, err := other(t).Unwrap(t.Context(), b, w); !errors.Is(err, kms.ErrWrongKey) {
			t.Fatalf("generated: %v", err)
		}
		w, err := k.Wrap(t.Context(), b, key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := other(t).Unwrap(t.Context(), b, w); !errors.Is(err, kms.ErrWrongKey) {
			t.Fatalf("wrapped: %v", err)
		}
	})

	t.Run("a changed wrapped key does not open", func(t *testing.T) {
		k := open(t)
		key, err := secret.Random(b.Length)
		if err != nil {
			t.Fatal(err)
		}
		w, err := k.Wrap(t.Context(), b, key)
		if err != nil {
			t.Fatal(err)
		}
		for name, change := range map[string]func(w *kms.Wrapped){
			"truncated": func(w *kms.Wrapped) { w.Blob = w.Blob[:len(w.Blob)-1] },
			"empty":     func(w *kms.Wrapped) { w.Blob = nil },
			"longer":    func(w *kms.Wrapped) { w.Blob = append(w.Blob, 0) },
			// In what is encrypted, whatever stands before it.
			"bit flip":    func(w *kms.Wrapped) { w.Blob[len(w.Blob)*3/4] ^= 1 },
			"scheme":      func(w *kms.Wrapped) { w.Scheme = "none" },
			"KEK":         func(w *kms.Wrapped) { w.KEK += "x" },
			"endless":     func(w *kms.Wrapped) { w.Blob = make([]byte, 1<<20) },
			"all of none": func(w *kms.Wrapped) { *w = kms.Wrapped{} },
		} {
			bad := w
			bad.Blob = append([]byte(nil), w.Blob...)
			change(&bad)
			if _, err := k.Unwrap(t.Context(), b, bad); !errors.Is(err, kms.ErrWrongKey) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})

	t.Run("bindings out of bounds are refused cheaply (case 16)", func(t *testing.T) {
		k := open(t)
		if bed.Stall != nil {
			defer bed.Stall(t)() // nobody is asked
		}
		for name, change := range map[string]func(*kms.Binding){
			"no volume":     func(b *kms.Binding) { b.VolumeID = "" },
			"path":          func(b *kms.Binding) { b.VolumeID = "a/../b" },
			"dots":          func(b *kms.Binding) { b.VolumeID = "a..b" },
			"NUL":           func(b *kms.Binding) { b.VolumeID = "a\x00b" },
			"look-alike":    func(b *kms.Binding) { b.VolumeID = "dаta" },
			"1 MiB":         func(b *kms.Binding) { b.VolumeID = strings.Repeat("a", 1<<20) },
			"no purpose":    func(b *kms.Binding) { b.Purpose = "" },
			"version 0":     func(b *kms.Binding) { b.Version = 0 },
			"length 0":      func(b *kms.Binding) { b.Length = 0 },
			"length 15":     func(b *kms.Binding) { b.Length = 15 },
			"length 65":     func(b *kms.Binding) { b.Length = 65 },
			"length 2^32-1": func(b *kms.Binding) { b.Length = 1<<32 - 1 },
		} {
			bad := b
			change(&bad)
			if _, _, err := k.Generate(t.Context(), bad); !errors.Is(err, kms.ErrBinding) {
				t.Errorf("%s: generate: %v", name, err)
			}
			if _, err := k.Unwrap(t.Context(), bad, kms.Wrapped{}); !errors.Is(err, kms.ErrBinding) {
				t.Errorf("%s: unwrap: %v", name, err)
			}
		}
	})

	t.Run("keys of all lengths come back", func(t *testing.T) {
		k := open(t)
		for _, length := range []int{kms.MinLength, 24, 33, kms.MaxLength} {
			mine := b
			mine.Length = length
			key, w := generate(t, k, mine)
			got, err := k.Unwrap(t.Context(), mine, w)
			if err != nil || !got.Equal(key) {
				t.Errorf("%d bytes: %v", length, err)
			}
		}
	})

	t.Run("the KEK that wraps now has a name", func(t *testing.T) {
		k := open(t)
		key, _ := generate(t, k, b)
		w, err := k.Wrap(t.Context(), b, key)
		if err != nil {
			t.Fatal(err)
		}
		if name := current(t, k); name != w.KEK || name == "" {
			t.Errorf("it is %q, a key was wrapped under %q", name, w.KEK)
		}
		if name := current(t, other(t)); name == w.KEK {
			t.Errorf("two KEKs have the name %q", name)
		}
		if bed.Rotate == nil {
			t.Log("a KEK of this backend has no versions")
			return
		}
		bed.Rotate(t)
		k = open(t)
		next, err := k.Wrap(t.Context(), b, key)
		if err != nil {
			t.Fatal(err)
		}
		if name := current(t, k); name != next.KEK || next.KEK == w.KEK {
			t.Errorf("after its rotation it is %q, was %q, and wraps under %q", name, w.KEK, next.KEK)
		}
		for _, w := range []kms.Wrapped{w, next} {
			if got, err := k.Unwrap(t.Context(), b, w); err != nil || !got.Equal(key) {
				t.Errorf("under %q: %v", w.KEK, err)
			}
		}
		stale := kms.Wrapped{Scheme: w.Scheme, KEK: next.KEK, Blob: w.Blob}
		if _, err := k.Unwrap(t.Context(), b, stale); !errors.Is(err, kms.ErrWrongKey) {
			t.Errorf("an older wrapped key under the name of the newer KEK: %v", err)
		}
	})

	t.Run("a cancelled context ends the call", func(t *testing.T) {
		k := open(t)
		_, w := generate(t, k, b)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, _, err := k.Generate(ctx, b); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if _, err := k.Unwrap(ctx, b, w); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})

	t.Run("a context that is cancelled in the middle of a call ends it", func(t *testing.T) {
		if bed.Stall == nil {
			t.Log("this backend asks no service")
			return
		}
		k := open(t)
		key, w := generate(t, k, b)
		defer bed.Stall(t)()
		for name, call := range map[string]func(context.Context) error{
			"generate": func(ctx context.Context) error { _, _, err := k.Generate(ctx, b); return err },
			"wrap":     func(ctx context.Context) error { _, err := k.Wrap(ctx, b, key); return err },
			"unwrap":   func(ctx context.Context) error { _, err := k.Unwrap(ctx, b, w); return err },
		} {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(50*time.Millisecond, cancel)
			if err := call(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, kms.ErrWrongKey) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})

	t.Run("what is closed gives no key, and closes twice", func(t *testing.T) {
		k := open(t)
		_, w := generate(t, k, b)
		c, ok := k.(io.Closer)
		if !ok {
			t.Fatal("it cannot be closed")
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Errorf("twice: %v", err)
		}
		if _, err := k.Unwrap(t.Context(), b, w); !errors.Is(err, kms.ErrClosed) {
			t.Errorf("unwrap: %v", err)
		}
		if _, _, err := k.Generate(t.Context(), b); !errors.Is(err, kms.ErrClosed) {
			t.Errorf("generate: %v", err)
		}
	})

	t.Run("concurrent callers do not disturb each other", func(t *testing.T) {
		k := open(t)
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				mine := b
				mine.Version = uint32(i + 1)
				key, w, err := k.Generate(t.Context(), mine)
				if err != nil {
					t.Error(err)
					return
				}
				got, err := k.Unwrap(t.Context(), mine, w)
				if err != nil || !got.Equal(key) {
					t.Errorf("another key came back, %v", err)
				}
			})
		}
		wg.Wait()
	})
}

func current(t *testing.T, k kms.KMS) string {
	t.Helper()
	n, ok := k.(kms.Namer)
	if !ok {
		t.Fatal("it cannot name its KEK")
	}
	name, err := n.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func generate(t *testing.T, k kms.KMS, b kms.Binding) (*secret.Bytes, kms.Wrapped) {
	t.Helper()
	key, w, err := k.Generate(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	if key.Len() != b.Length {
		t.Fatalf("the key has %d bytes, want %d", key.Len(), b.Length)
	}
	t.Cleanup(func() { key.Close() })
	return key, w
}
