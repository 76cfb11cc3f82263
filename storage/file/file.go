// Package file is a storage in one folder of a local filesystem, the default of
// a key service on one machine.
//
// Each object is one file, framed by framed.Frame, and its version is the
// frame's token. A write goes to a temporary file that is synced and
// renamed over the old one, and the folder is synced as well, so that a crash
// leaves the old object or the new one. A lock on the folder makes
// compare-and-swap hold between processes.
package file

import (
	"context"
	"crypto/rand"
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
	"github.com/keyagent/keyagent/storage/framed"
)

const (
	lockName   = ".lock"
	claimName  = ".service" // who has it locked is alone
	tempPrefix = ".tmp-"
	suffix     = ".obj" // so that an object may have the name of another's folder
)

// Storage keeps objects in a folder.
type Storage struct {
	dir   string
	root  *os.Root // nothing outside of the folder is reached, whatever lies in it
	owner *owner   // who gets what is written; nil: this process's user
	lock  *os.File
	claim *os.File      // see Alone
	turn  chan struct{} // the file lock is of the open file, which goroutines share
}

// owner of the folder.
type owner struct{ uid, gid int }

var (
	_ storage.Storage = (*Storage)(nil)
	_ storage.Deleter = (*Storage)(nil)
)

// Open opens the folder dir, and makes it if its parent exists. A folder that
// others can write to is refused, and so is one of another user than root and this
// one.
func Open(dir string) (*Storage, error) { return openFolder(dir, false) }

// OpenOfService is Open for root's commands on the folder of a key service that runs
// as another user: what is written there stays that user's.
func OpenOfService(dir string) (*Storage, error) { return openFolder(dir, true) }

func openFolder(dir string, ofService bool) (_ *Storage, err error) {
	switch err := os.Mkdir(dir, 0o700); {
	case err == nil:
		// A record that is durable in a folder that is not would be lost with it.
		if err := syncDir(filepath.Dir(dir)); err != nil {
			return nil, err
		}
	case !errors.Is(err, fs.ErrExist):
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	s := &Storage{dir: dir, root: root, turn: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := s.admit(ofService); err != nil {
		return nil, err
	}
	if s.lock, err = s.lockFile(lockName); err != nil {
		return nil, err
	}
	return s, s.locked(context.Background(), s.sweep)
}

// admit checks the folder itself, and finds out whose it is.
func (s *Storage) admit(ofService bool) error {
	st, err := s.root.Stat(".")
	switch {
	case err != nil:
		return err
	case st.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("%s has mode %04o, others can write to it (hint: chmod 700 %s)", s.dir, st.Mode().Perm(), s.dir)
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || sys.Uid == 0 || int(sys.Uid) == os.Geteuid() {
		return nil
	}
	if !ofService || os.Geteuid() != 0 {
		return fmt.Errorf("%s belongs to uid %d, who can put back older records (hint: chown it to root or to this user)", s.dir, sys.Uid)
	}
	s.owner = &owner{int(sys.Uid), int(sys.Gid)}
	return nil
}

// lockFile opens a file that is only there to be locked.
func (s *Storage) lockFile(name string) (*os.File, error) {
	f, err := s.root.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(s.give(f), s.syncDir(".")); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// give makes the owner of the folder that of a file.
func (s *Storage) give(f *os.File) error {
	if s.owner == nil {
		return nil
	}
	return f.Chown(s.owner.uid, s.owner.gid)
}

// Alone makes sure, until Close, that no other process has called Alone on the
// folder: a key service that is alone need not write down each renewal of a lease.
func (s *Storage) Alone() error {
	f, err := s.lockFile(claimName)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return errors.Join(fmt.Errorf("another key service has %s: %w (hint: storage://file is for one; several share etcd or a cloud's storage)", s.dir, err), f.Close())
	}
	s.claim = f
	return nil
}

// Close gives the folder back.
func (s *Storage) Close() error {
	var errs []error
	for _, f := range []*os.File{s.claim, s.lock} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(append(errs, s.root.Close())...)
}

// sweep removes what writes that were killed left behind.
func (s *Storage) sweep() error {
	return filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.HasPrefix(d.Name(), tempPrefix) {
			rel, err := filepath.Rel(s.dir, path)
			if err != nil {
				return err
			}
			return s.root.Remove(rel)
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

func (s *Storage) path(name string) string { return filepath.FromSlash(name + suffix) }

// Get implements storage.Storage.
func (s *Storage) Get(ctx context.Context, name string) ([]byte, storage.Version, error) {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return nil, "", err
	}
	return s.read(name)
}

func (s *Storage) read(name string) ([]byte, storage.Version, error) {
	f, err := s.root.OpenFile(s.path(name), os.O_RDONLY|unix.O_NOFOLLOW, 0)
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
	data, token, err := framed.Read(f)
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
	body, token := framed.Frame(data)
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
	temp := filepath.Join(dir, tempPrefix+rand.Text())
	tmp, err := s.root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = s.root.Remove(temp)
		}
	}()
	_, err = tmp.Write(body)
	// Close is where some filesystems report that the write failed.
	if err = errors.Join(err, s.give(tmp), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := s.root.Rename(temp, path); err != nil {
		return err
	}
	return s.syncDir(dir)
}

// mkdirs makes the folders of an object, each one durable in its parent.
func (s *Storage) mkdirs(dir string) error {
	if dir == "." {
		return nil
	}
	if st, err := s.root.Lstat(dir); err == nil && st.IsDir() {
		return nil
	}
	if err := s.mkdirs(filepath.Dir(dir)); err != nil {
		return err
	}
	switch err := s.root.Mkdir(dir, 0o700); {
	case errors.Is(err, fs.ErrExist):
	case err != nil:
		return err
	case s.owner != nil:
		if err := s.root.Lchown(dir, s.owner.uid, s.owner.gid); err != nil {
			return err
		}
	}
	return s.syncDir(filepath.Dir(dir))
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
		if err := s.root.Remove(s.path(name)); err != nil {
			return err
		}
		dir := filepath.Dir(s.path(name))
		if err := s.syncDir(dir); err != nil {
			return err
		}
		// A folder that is not empty stays.
		for ; dir != "." && s.root.Remove(dir) == nil; dir = filepath.Dir(dir) {
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

func (s *Storage) syncDir(dir string) error {
	d, err := s.root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
