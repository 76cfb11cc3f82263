package secret

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Protection names how the pages of a secret are kept.
type Protection string

const (
	// MemfdSecret: pages outside the kernel's direct map (Linux ≥ 5.14 with
	// secretmem enabled).
	MemfdSecret Protection = "memfd_secret"
	// Mlock: anonymous pages, locked, not dumped, wiped on fork.
	Mlock Protection = "mlock"
)

// InForce reports the protection that this kernel gives to every secret.
func InForce() Protection {
	if memfdWorks() {
		return MemfdSecret
	}
	return Mlock
}

var memfdWorks = sync.OnceValue(func() bool {
	m, err := mapMemfd(1)
	if err != nil {
		return false
	}
	_ = m.destroy()
	return true
})

// mapping is a page-aligned area that only this process can read.
type mapping struct {
	data []byte
}

func newMapping(n int) (*mapping, error) {
	page := os.Getpagesize()
	size := (n + page - 1) / page * page
	if memfdWorks() {
		return mapMemfd(size)
	}
	return mapLocked(size)
}

func mapMemfd(size int) (*mapping, error) {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_secret: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, fmt.Errorf("size of the secret's memory: %w", err)
	}
	data, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, memlockHint("map the secret's memory", err)
	}
	// A shared mapping survives fork: a child must not inherit it.
	if err := unix.Madvise(data, unix.MADV_DONTFORK); err != nil {
		_ = unix.Munmap(data)
		return nil, fmt.Errorf("keep the secret from children: %w", err)
	}
	return &mapping{data: data}, nil
}

func mapLocked(size int) (*mapping, error) {
	data, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map the secret's memory: %w", err)
	}
	if err := unix.Mlock(data); err != nil {
		_ = unix.Munmap(data)
		return nil, memlockHint("lock the secret's memory", err)
	}
	for _, advice := range []int{unix.MADV_DONTDUMP, unix.MADV_WIPEONFORK} {
		if err := unix.Madvise(data, advice); err != nil {
			_ = unix.Munmap(data)
			return nil, fmt.Errorf("protect the secret's memory: %w", err)
		}
	}
	return &mapping{data: data}, nil
}

func memlockHint(what string, err error) error {
	return fmt.Errorf("%s: %w (hint: raise the limit of locked memory, LimitMEMLOCK= in a unit)", what, err)
}

func (m *mapping) destroy() error {
	Wipe(m.data)
	return unix.Munmap(m.data)
}
