// Package file is a storage in one folder of a local filesystem, the default of
// a key service on one machine.
//
// Each object is one file, framed by storage.Frame, and its version is the
// frame's token. A write goes to a temporary file that is synced and
// renamed over the old one, and the folder is synced as well, so that a crash
// leaves the old object or the new one. A lock on the folder makes
// compare-and-swap hold between processes.
package file

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/storage"
)

const (
	lockName   = ".lock"
	tempPrefix = ".tmp-"
	suffix     = ".obj" // so that an object may have the name of another's folder
)

// Storage keeps objects in a folder.
type Storage struct {
	dir  string
	lock *os.File
	turn chan struct{} // the file lock is of the open file, which goroutines share
}

var (
	_ storage.Storage = (*Storage)(nil)
	_ storage.Deleter = (*Storage)(nil)
)

// Open opens the folder dir, and makes it if its parent exists. A folder that
// others can write to is refused.
func Open(dir string) (*Storage, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	st, err := os.Stat(dir)
	switch {
	case err != nil:
		return nil, err
	case !st.IsDir():
		return nil, fmt.Errorf("%s is not a folder", dir)
	case st.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("%s has mode %04o, others can write to it (hint: chmod 700 %s)", dir, st.Mode().Perm(), dir)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && sys.Uid != 0 && int(sys.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("%s belongs to uid %d, who can put back older records (hint: chown it to root or to this user)", dir, sys.Uid)
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	s := &Storage{dir: dir, lock: lock, turn: make(chan struct{}, 1)}
	if err := s.locked(context.Background(), s.sweep); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return s, nil
}

// Close gives the folder back.
func (s *Storage) Close() error { return s.lock.Close() }

// sweep removes what writes that were killed left behind.
func (s *Storage) sweep() error {
	return filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.HasPrefix(d.Name(), tempPrefix) {
			return os.Remove(path)
		}
		return err
	})
}

// lockPause is how long a lock that another process has is left alone.
const lockPause = 5 * time.Millisecond

// locked calls f while no other goroutine or process writes. It does not wait beyond
// ctx: another process may have been stopped while it held the lock.
func (s *Storage) locked(ctx context.Context, f func() error) error {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("lock %s: %w", s.dir, err)
		}
		select {
		case <-time.After(lockPause):
		case <-ctx.Done():
			return fmt.Errorf("lock %s, which another process has: %w", s.dir, ctx.Err())
		}
	}
	defer func() { _ = unix.Flock(int(s.lock.Fd()), unix.LOCK_UN) }()
	return f()
}

func (s *Storage) path(name string) string { return filepath.Join(s.dir, name+suffix) }

// Get implements storage.Storage.
func (s *Storage) Get(ctx context.Context, name string) ([]byte, storage.Version, error) {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return nil, "", err
	}
	return s.read(name)
}

func (s *Storage) read(name string) ([]byte, storage.Version, error) {
	f, err := os.OpenFile(s.path(name), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if err := s.present(); err != nil {
			return nil, "", err
		}
		return nil, "", storage.ErrNotFound
	}
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	data, token, err := storage.ReadFrame(f)
	if err != nil {
		return nil, "", fmt.Errorf("%w: %s", err, name)
	}
	return data, storage.Version(token), nil
}

// present demands that the folder is there: without it, no object is known to be
// absent.
func (s *Storage) present() error {
	if _, err := os.Stat(s.dir); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s", storage.ErrNoBucket, s.dir)
	}
	return nil
}

// expect compares the stored version. The lock is held.
func (s *Storage) expect(name string, want storage.Version) error {
	_, have, err := s.read(name)
	if err != nil && !errors.Is(err, storage.ErrNotFound) {
		return err
	}
	if have != want {
		return storage.ErrConflict
	}
	return nil
}

// Put implements storage.Storage.
func (s *Storage) Put(ctx context.Context, name string, data []byte, expect storage.Version) (storage.Version, error) {
	if err := errors.Join(ctx.Err(), storage.CheckPut(name, data)); err != nil {
		return "", err
	}
	body, token := storage.Frame(data)
	err := s.locked(ctx, func() error {
		if err := s.expect(name, expect); err != nil {
			return err
		}
		return s.write(name, body)
	})
	if err != nil {
		return "", err
	}
	return storage.Version(token), nil
}

func (s *Storage) write(name string, body []byte) (err error) {
	path := s.path(name)
	dir := filepath.Dir(path)
	if err := s.mkdirs(dir); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, tempPrefix)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp.Name())
		}
	}()
	_, err = tmp.Write(body)
	// Close is where some filesystems report that the write failed.
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

// mkdirs makes the folders of an object, each one durable in its parent.
func (s *Storage) mkdirs(dir string) error {
	if dir == s.dir {
		return nil
	}
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := s.mkdirs(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// Delete implements storage.Deleter.
func (s *Storage) Delete(ctx context.Context, name string, expect storage.Version) error {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return err
	}
	return s.locked(ctx, func() error {
		if _, _, err := s.read(name); errors.Is(err, storage.ErrNotFound) {
			return err
		}
		if err := s.expect(name, expect); err != nil {
			return err
		}
		if err := os.Remove(s.path(name)); err != nil {
			return err
		}
		dir := filepath.Dir(s.path(name))
		if err := syncDir(dir); err != nil {
			return err
		}
		// A folder that is not empty stays.
		for ; dir != s.dir && os.Remove(dir) == nil; dir = filepath.Dir(dir) {
		}
		return nil
	})
}

// List implements storage.Storage.
func (s *Storage) List(ctx context.Context, prefix, after string, limit int) ([]string, error) {
	if err := errors.Join(ctx.Err(), s.present()); err != nil {
		return nil, err
	}
	var names []string
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		rel, err := filepath.Rel(s.dir, path)
		if err != nil {
			return err
		}
		name, ok := strings.CutSuffix(rel, suffix)
		if ok && d.Type().IsRegular() && storage.CheckName(name) == nil && strings.HasPrefix(name, prefix) && name > after {
			names = append(names, name)
		}
		return nil
	})
	slices.Sort(names) // the walk's order is that of paths, not of names
	return names[:max(0, min(limit, len(names)))], err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
