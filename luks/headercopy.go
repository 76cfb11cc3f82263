package luks

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// headerCopy is a header in anonymous memory, as a file that libcryptsetup can
// be pointed at. It has no name in any directory and goes with its descriptor.
type headerCopy struct{ file *os.File }

// newHeaderCopy returns an empty one. It is as long as a real device's head,
// since libcryptsetup checks that the areas and some data would fit; the pages
// that nobody writes take no memory.
func newHeaderCopy() (*headerCopy, error) {
	fd, err := unix.MemfdCreate("keyagent-header", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make header copy: %w", err)
	}
	c := &headerCopy{os.NewFile(uintptr(fd), "keyagent-header")}
	if err := c.file.Truncate(minDevice); err != nil {
		c.Close()
		return nil, fmt.Errorf("make header copy: %w", err)
	}
	return c, nil
}

// copyOf returns a sealed copy of an authentic header: what was checked is what
// will be used, even if something in this process or libcryptsetup's recovery
// wanted to write to it.
func copyOf(h *Header) (*headerCopy, error) {
	c, err := newHeaderCopy()
	if err != nil {
		return nil, err
	}
	if _, err := c.file.WriteAt(h.raw, 0); err != nil {
		c.Close()
		return nil, fmt.Errorf("fill header copy: %w", err)
	}
	const seals = unix.F_SEAL_WRITE | unix.F_SEAL_GROW | unix.F_SEAL_SHRINK | unix.F_SEAL_SEAL
	if _, err := unix.FcntlInt(c.file.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		c.Close()
		return nil, fmt.Errorf("seal header copy: %w", err)
	}
	return c, nil
}

// path leads to the copy inside this process only.
func (c *headerCopy) path() string { return fmt.Sprintf("/proc/self/fd/%d", c.file.Fd()) }

// guardedBytes reads back what the guard covers.
func (c *headerCopy) guardedBytes(f *form) ([]byte, error) {
	raw := make([]byte, f.size())
	if _, err := c.file.ReadAt(raw, 0); err != nil {
		return nil, fmt.Errorf("read header copy: %w", err)
	}
	return raw, nil
}

// Close releases the copy.
func (c *headerCopy) Close() error { return c.file.Close() }
