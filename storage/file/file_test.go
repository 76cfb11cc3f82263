package file

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/storagetest"
)

func open(t *testing.T, dir string) *Storage {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	storagetest.Run(t, func(t *testing.T) storagetest.Bed {
		dir := filepath.Join(t.TempDir(), "records")
		return storagetest.Bed{
			Open:   func() storage.Storage { return open(t, dir) },
			Remove: func() { must(t, os.RemoveAll(dir)) },
			Plant:  func(name string, data []byte) { must(t, os.WriteFile(filepath.Join(dir, name+suffix), data, 0o600)) },
		}
	})
}

func TestAFolderThatOthersCanWriteIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o770); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil {
		t.Fatal("opened")
	}
}

func TestDamageIsNoticedAndNeverTakenForAbsence(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "records")
	s := open(t, dir)
	if _, err := s.Put(t.Context(), "a", []byte("data of some length"), storage.Absent); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "a.obj")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	flipped := append([]byte(nil), whole...)
	flipped[len(flipped)-1] ^= 1
	for name, content := range map[string][]byte{"empty": {}, "truncated": whole[:len(whole)-1], "header only": whole[:20], "bit flip": flipped, "longer": append(whole, 'x')} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Get(t.Context(), "a"); !errors.Is(err, storage.ErrCorrupt) {
			t.Errorf("%s: get: %v", name, err)
		}
		if _, err := s.Put(t.Context(), "a", []byte("new"), storage.Absent); !errors.Is(err, storage.ErrCorrupt) {
			t.Errorf("%s: put: %v", name, err)
		}
	}
}

func TestWhatAKilledWriteLeftIsRemoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "records")
	open(t, dir)
	left := filepath.Join(dir, tempPrefix+"123")
	if err := os.WriteFile(left, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if names, err := open(t, dir).List(t.Context(), "", "", 10); err != nil || len(names) != 0 {
		t.Fatalf("%v, %v", names, err)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Fatal("the left-over is still there")
	}
}

func TestASymlinkIsNotFollowed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "records")
	s := open(t, dir)
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "a.obj")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Get(t.Context(), "a"); err == nil || errors.Is(err, storage.ErrNotFound) {
		t.Fatal(err)
	}
}
