package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Cache keeps what is expensive to make (kernel, root file system) in a
// directory. Entries are named by a hash of their inputs, appear by rename, and
// are never changed afterwards, so any number of processes may share one Cache.
type Cache struct {
	dir string
}

// OpenCache uses dir, or, if dir is empty, keyagent/bed in the user's cache
// directory. The directory is made if it does not exist.
func OpenCache(dir string) (*Cache, error) {
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("open cache: %w", err)
		}
		dir = filepath.Join(base, "keyagent", "bed")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	return &Cache{dir: dir}, nil
}

// entry returns the directory of the entry of that kind and those inputs. If
// there is none, build fills an empty directory, which becomes the entry only if
// build succeeds. Other processes that want the same entry wait.
func (c *Cache) entry(ctx context.Context, kind string, inputs []string, build func(dir string) error) (string, error) {
	final := filepath.Join(c.dir, kind+"-"+digestOf(inputs))
	if exists(final) {
		return final, nil
	}
	unlock, err := lock(ctx, final+".lock")
	if err != nil {
		return "", fmt.Errorf("cache %s: %w", kind, err)
	}
	defer unlock()
	if exists(final) {
		return final, nil
	}
	temp, err := os.MkdirTemp(c.dir, ".new-"+kind+"-")
	if err != nil {
		return "", fmt.Errorf("cache %s: %w", kind, err)
	}
	defer os.RemoveAll(temp) // a no-op once renamed
	if err := os.Chmod(temp, 0o755); err != nil {
		return "", fmt.Errorf("cache %s: %w", kind, err)
	}
	if err := build(temp); err != nil {
		return "", err
	}
	if err := os.Rename(temp, final); err != nil {
		return "", fmt.Errorf("cache %s: %w", kind, err)
	}
	return final, nil
}

// digestOf hashes strings such that no two different lists give the same input
// to the hash.
func digestOf(inputs []string) string {
	h := sha256.New()
	for _, s := range inputs {
		fmt.Fprintf(h, "%d:%s,", len(s), s)
	}
	return hex.EncodeToString(h.Sum(nil)[:12])
}

// lock takes an exclusive lock on a file that it leaves behind: removing it
// would let a third process lock a new file of the same name.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	locked := make(chan error, 1)
	go func() { locked <- flock(file) }()
	select {
	case err := <-locked:
		if err != nil {
			file.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		return func() { file.Close() }, nil
	case <-ctx.Done():
		// flock cannot be interrupted: whenever it returns, give the lock back.
		go func() { <-locked; file.Close() }()
		return nil, fmt.Errorf("wait for another process to finish %s: %w", filepath.Base(path), context.Cause(ctx))
	}
}

func flock(file *os.File) error {
	for {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
