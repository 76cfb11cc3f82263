package luks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// medium is what a format reads and writes. Tests put a failing one in place of
// the file.
type medium interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// disk is an open device, or a plain file that holds the image of one. All
// checks and all writes of one call go through one disk, so that they concern
// one device whatever becomes of its path.
type disk struct {
	medium
	file  *os.File
	path  string
	size  int64
	block bool
	rdev  DevNum // of a block device
}

// openShared opens a device for reading.
func openShared(path string) (*disk, error) { return openDisk(path, unix.O_RDONLY) }

// openExclusive opens a device for writing and claims it: the kernel refuses
// the claim while the device is mounted or mapped, and refuses both while the
// claim stands.
func openExclusive(path string) (*disk, error) {
	d, err := openDisk(path, unix.O_RDWR|unix.O_EXCL)
	if err != nil {
		return nil, err
	}
	if !d.block {
		if err := unix.Flock(int(d.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			d.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("%w: another process works on %s", ErrDeviceBusy, path)
			}
			return nil, fmt.Errorf("%w: lock %s: %w", ErrIO, path, err)
		}
	}
	return d, nil
}

func openDisk(path string, flags int) (*disk, error) {
	// O_NONBLOCK keeps the open of a FIFO from waiting for ever; it has no
	// meaning for the files and block devices that pass the check below.
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return nil, fmt.Errorf("%w: %s is mounted, mapped or claimed", ErrDeviceBusy, path)
	case err != nil:
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	// Not os.NewFile's poller: the descriptor is a file or a block device.
	_ = unix.SetNonblock(fd, false)
	d := &disk{file: os.NewFile(uintptr(fd), path), path: path}
	d.medium = d.file
	if err := d.stat(); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *disk) stat() error {
	var st unix.Stat_t
	if err := unix.Fstat(int(d.file.Fd()), &st); err != nil {
		return fmt.Errorf("%w: stat %s: %w", ErrIO, d.path, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		d.size = st.Size
	case unix.S_IFBLK:
		d.block = true
		d.rdev = DevNum{unix.Major(st.Rdev), unix.Minor(st.Rdev)}
		var size uint64
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, d.file.Fd(), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size))); errno != 0 {
			return fmt.Errorf("%w: size of %s: %w", ErrIO, d.path, errno)
		}
		d.size = int64(size)
	default:
		return fmt.Errorf("%w: %s is neither a block device nor a file", ErrNotBlockDevice, d.path)
	}
	return nil
}

// Close releases the device and every claim on it.
func (d *disk) Close() error { return d.file.Close() }

// read fills p from offset. A device that ends early and a device that fails
// are two errors, and neither is an empty device.
func (d *disk) read(p []byte, offset int64) error {
	n, err := d.ReadAt(p, offset)
	switch {
	case n == len(p):
		return nil
	case err == nil, errors.Is(err, io.EOF):
		return fmt.Errorf("%w: %s ends at byte %d", ErrShortHeader, d.path, offset+int64(n))
	default:
		return fmt.Errorf("%w: read %s at byte %d: %w", ErrIO, d.path, offset, err)
	}
}

// writeDurably puts p at offset and returns when it will survive a power loss.
func (d *disk) writeDurably(p []byte, offset int64) error {
	if _, err := d.WriteAt(p, offset); err != nil {
		return fmt.Errorf("%w: write %s at byte %d: %w", ErrIO, d.path, offset, err)
	}
	return d.flush()
}

func (d *disk) flush() error {
	if err := d.Sync(); err != nil {
		return fmt.Errorf("%w: flush %s: %w", ErrIO, d.path, err)
	}
	return nil
}

// settle flushes the device and forgets what is cached of the header, so that the
// next read is answered by the device itself: a page that failed to be written
// stays in the cache and looks like one that was.
func (d *disk) settle() error {
	if err := d.flush(); err != nil {
		return err
	}
	if d.file != nil {
		_ = unix.Fadvise(int(d.file.Fd()), 0, guardedSize, unix.FADV_DONTNEED) // advice: it cannot be demanded
	}
	return nil
}

// checkSize refuses a device that could be formatted but not opened.
func (d *disk) checkSize() error {
	switch {
	case d.size < minDevice:
		return fmt.Errorf("%w: it has %d bytes, needed are %d", ErrDeviceSize, d.size, minDevice)
	case d.size%dataSectorSize != 0:
		return fmt.Errorf("%w: %d bytes are not a multiple of %d", ErrDeviceSize, d.size, dataSectorSize)
	}
	return nil
}

// readGuarded reads the bytes that the guard and the MAC cover, once.
func (d *disk) readGuarded(ctx context.Context) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if d.size < guardedSize {
		return nil, fmt.Errorf("%w: %s has %d bytes", ErrShortHeader, d.path, d.size)
	}
	raw := make([]byte, guardedSize)
	if err := d.read(raw, 0); err != nil {
		return nil, err
	}
	return raw, nil
}
