package file

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// Case 42: the disk is full when an object is written, synced or closed. What was
// there before stays as it was.
func TestAFullFileSystemLosesNothing(t *testing.T) {
	mount := t.TempDir()
	if err := unix.Mount("tmpfs", mount, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=256k"); err != nil {
		t.Fatalf("mount: %v (hint: this test needs root)", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(mount, 0)) })
	s, err := Open(filepath.Join(mount, "records"))
	must(t, err)
	defer s.Close()
	want := map[string]string{}
	versions := map[string]storage.Version{}
	large := strings.Repeat("x", storage.MaxObject)
	var full error
	for i := 0; full == nil; i++ {
		name := fmt.Sprintf("v%d", i)
		var v storage.Version
		if v, full = s.Put(t.Context(), name, []byte(large), storage.Absent); full == nil {
			want[name], versions[name] = large, v
		}
		if i > 10 {
			t.Fatal("the file system does not fill up")
		}
	}
	if !errors.Is(full, unix.ENOSPC) {
		t.Errorf("a first write: %v", full)
	}
	if _, err := s.Put(t.Context(), "v0", []byte(strings.Repeat("y", storage.MaxObject)), versions["v0"]); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a change: %v", err)
	}
	names, err := s.List(t.Context(), "", "", 100)
	must(t, err)
	if len(names) != len(want) {
		t.Errorf("there are %q", names)
	}
	for name, data := range want {
		if got, v, err := s.Get(t.Context(), name); err != nil || string(got) != data || v != versions[name] {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.Delete(t.Context(), "v0", versions["v0"]); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "v0", []byte(large), storage.Absent); err != nil {
		t.Errorf("with room again: %v", err)
	}
}

// A process that was stopped while it had the lock holds nobody up beyond his time.
func TestAWriteDoesNotWaitForALockBeyondItsTime(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "records")
	s := open(t, dir)
	other, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR, 0)
	must(t, err)
	defer other.Close()
	must(t, unix.Flock(int(other.Fd()), unix.LOCK_EX))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Put(ctx, "a", nil, storage.Absent); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if _, _, err := s.Get(t.Context(), "a"); !errors.Is(err, storage.ErrNotFound) {
		t.Error(err)
	}
	must(t, unix.Flock(int(other.Fd()), unix.LOCK_UN))
	if _, err := s.Put(t.Context(), "a", nil, storage.Absent); err != nil {
		t.Error(err)
	}
}

func TestAFolderOfSomebodyElseIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root, to give a folder away")
	}
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o700))
	must(t, os.Chown(dir, 12345, 0))
	if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "uid 12345") {
		t.Error(err)
	}
}

// Root's commands leave a key service's folder to the key service.
func TestWhatRootWritesBelongsToTheOwnerOfTheFolder(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root, to give a folder away")
	}
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o700))
	must(t, os.Chown(dir, 12345, 23456))
	s, err := OpenOfService(dir)
	must(t, err)
	defer s.Close()
	v, err := s.Put(t.Context(), "volumes/a/b", []byte("x"), storage.Absent)
	must(t, err)
	_, err = s.Put(t.Context(), "volumes/a/b", []byte("y"), v)
	must(t, err)
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		must(t, err)
		st, err := d.Info()
		must(t, err)
		if sys := st.Sys().(*syscall.Stat_t); sys.Uid != 12345 || sys.Gid != 23456 {
			t.Errorf("%s belongs to %d:%d", path, sys.Uid, sys.Gid)
		}
		return nil
	}))
	// Anyone who owns the folder leads root nowhere else.
	elsewhere := t.TempDir()
	must(t, os.RemoveAll(filepath.Join(dir, "volumes")))
	must(t, os.Symlink(elsewhere, filepath.Join(dir, "volumes")))
	if _, err := s.Put(t.Context(), "volumes/c", []byte("x"), storage.Absent); err == nil {
		t.Error("a link led out of the folder")
	}
	if names, _ := os.ReadDir(elsewhere); len(names) != 0 {
		t.Errorf("%v were written elsewhere", names)
	}
}

func TestOneKeyServiceIsAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "records")
	first, second := open(t, dir), open(t, dir)
	must(t, first.Alone())
	if err := second.Alone(); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("two are alone: %v", err)
	}
	if _, err := second.Put(t.Context(), "a", nil, storage.Absent); err != nil {
		t.Errorf("a command beside the key service: %v", err)
	}
	must(t, first.Close())
	must(t, second.Alone())
}
