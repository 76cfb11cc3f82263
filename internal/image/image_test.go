package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
)

// file makes a file of that content and returns its SHA-256.
func file(t *testing.T, content []byte) (path, sum string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	s := sha256.Sum256(content)
	return path, hex.EncodeToString(s[:])
}

func open(t *testing.T, path string, p Proof) *Source {
	t.Helper()
	s, err := Open(path, p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestAnImageIsCopiedWhole(t *testing.T) {
	for _, size := range []int{0, 1, chunk - 1, chunk, 2*chunk + 4096} {
		content := bytes.Repeat([]byte("image"), size/5+1)[:size]
		from, sum := file(t, content)
		to, _ := file(t, bytes.Repeat([]byte{0xff}, size+10))
		if err := open(t, from, Proof{SHA256: sum}).CopyTo(t.Context(), to); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
		got, err := os.ReadFile(to)
		if err != nil || !bytes.Equal(got[:size], content) || !bytes.Equal(got[size:], bytes.Repeat([]byte{0xff}, 10)) {
			t.Errorf("%d bytes: they differ, %v", size, err)
		}
	}
}

// The owner of the disk may change it before the copy and during it.
func TestAnotherImageIsRefused(t *testing.T) {
	content := bytes.Repeat([]byte("image"), chunk)
	from, sum := file(t, content)
	to, _ := file(t, make([]byte, len(content)))
	flipped := bytes.Clone(content)
	flipped[len(flipped)-1] ^= 1
	for name, change := range map[string]func(*Source){
		"a flipped bit":  func(*Source) { write(t, from, flipped) },
		"shorter":        func(*Source) { write(t, from, content[:len(content)-1]) },
		"empty":          func(*Source) { write(t, from, nil) },
		"another digest": func(s *Source) { s.want = strings.Repeat("0", 64) },
	} {
		write(t, from, content)
		s := open(t, from, Proof{SHA256: sum})
		change(s)
		if err := s.CopyTo(t.Context(), to); failure.Of(err).Class != failure.Tampered {
			t.Errorf("%s: %v", name, err)
		}
	}
	// One that grew since its size was looked at is copied as it was.
	write(t, from, content)
	s := open(t, from, Proof{SHA256: sum})
	write(t, from, append(bytes.Clone(content), "more"...))
	if err := s.CopyTo(t.Context(), to); err != nil {
		t.Errorf("longer by now: %v", err)
	}
	if err := open(t, from, Proof{SHA256: sum}).CopyTo(t.Context(), to); !errors.Is(err, ErrTooLarge) {
		t.Errorf("longer: %v", err)
	}
}

func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestWhatIsNoImageIsNotOpened(t *testing.T) {
	from, sum := file(t, []byte("image"))
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		path string
		p    Proof
		want error
	}{
		"nothing there": {filepath.Join(dir, "none"), Proof{SHA256: sum}, fs.ErrNotExist}, "a folder": {dir, Proof{SHA256: sum}, ErrMismatch},
		"a pipe": {pipe, Proof{SHA256: sum}, ErrMismatch}, "a character device": {"/dev/zero", Proof{SHA256: sum}, ErrMismatch},
		"no proof": {from, Proof{}, ErrMismatch}, "two proofs": {from, Proof{sum, sum}, ErrMismatch}, "a file with a root hash": {from, Proof{RootHash: sum}, ErrMismatch},
	} {
		if s, err := Open(tt.path, tt.p); !errors.Is(err, tt.want) || s != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestACopyThatIsStoppedSaysSo(t *testing.T) {
	from, sum := file(t, []byte("image"))
	to, _ := file(t, make([]byte, 5))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := open(t, from, Proof{SHA256: sum}).CopyTo(ctx, to); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
