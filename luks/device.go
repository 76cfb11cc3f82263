package luks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
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
// one device whatever becomes of its path. It serves one goroutine.
type disk struct {
	medium
	*worker
	file     *os.File
	path     string
	size     int64
	block    bool
	readOnly bool   // the device refuses writes
	rdev     DevNum // of a block device
}

// openShared opens a device for reading.
func openShared(ctx context.Context, path string) (*disk, error) {
	return openDisk(ctx, path, unix.O_RDONLY)
}

// openWritable opens a device for writing without a claim: it may be mapped.
func openWritable(ctx context.Context, path string) (*disk, error) {
	return openDisk(ctx, path, unix.O_RDWR)
}

// openExclusive opens a device for writing and claims it: the kernel refuses
// the claim while the device is mounted or mapped, and refuses both while the
// claim stands.
func openExclusive(ctx context.Context, path string) (*disk, error) {
	return openDisk(ctx, path, unix.O_RDWR|unix.O_EXCL)
}

// How often, and how long apart, a claim is tried again that another one is in the way of.
const (
	claimTries = 20
	claimPause = 25 * time.Millisecond
)

func openDisk(ctx context.Context, path string, flags int) (*disk, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	dev := blockNumber(path)
	if err := hung.check(ctx, dev, path); err != nil {
		return nil, err
	}
	d := &disk{path: path}
	d.worker = newWorker(ctx, path, dev, func() {
		if d.file != nil {
			_ = d.file.Close()
		}
	})
	if err := d.do(func() error { return d.open(flags) }); err != nil {
		d.Close()
		return nil, err
	}
	d.medium, d.device = d.file, d.file
	return d, nil
}

func (d *disk) open(flags int) error {
	// O_NONBLOCK keeps the open of a FIFO from waiting for ever; it has no
	// meaning for the files and block devices that pass the check below.
	fd, err := unix.Open(d.path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	// A program that this process starts meanwhile has copies of its descriptors until
	// it runs, also of one that claimed this device and is closed by now.
	for try := 0; flags&unix.O_EXCL != 0 && errors.Is(err, unix.EBUSY) && try < claimTries; try++ {
		time.Sleep(claimPause)
		fd, err = unix.Open(d.path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %s is mounted, mapped or claimed", ErrDeviceBusy, d.path)
	case flags&unix.O_RDWR != 0 && (errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) && isReadOnly(d.path)):
		return fmt.Errorf("%w: %s", ErrReadOnlyDevice, d.path)
	case err != nil:
		return &os.PathError{Op: "open", Path: d.path, Err: err}
	}
	// Not os.NewFile's poller: the descriptor is a file or a block device.
	_ = unix.SetNonblock(fd, false)
	d.file = os.NewFile(uintptr(fd), d.path)
	if err := d.stat(); err != nil {
		return err
	}
	if flags&unix.O_RDWR != 0 && d.readOnly { // some drivers notice at the first write only
		return fmt.Errorf("%w: %s", ErrReadOnlyDevice, d.path)
	}
	return nil
}

// isReadOnly says whether the device at path is one that cannot be written.
func isReadOnly(path string) bool {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	ro, err := unix.IoctlGetInt(fd, unix.BLKROGET)
	return err == nil && ro&0xff != 0
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
		ro, err := unix.IoctlGetInt(int(d.file.Fd()), unix.BLKROGET)
		d.readOnly = err == nil && ro&0xff != 0
	default:
		return fmt.Errorf("%w: %s is neither a block device nor a file", ErrNotBlockDevice, d.path)
	}
	return nil
}

// mustBeBlock refuses what cannot be mapped before anything is done with it.
func (d *disk) mustBeBlock() error {
	if !d.block {
		return fmt.Errorf("%w: %s", ErrNotBlockDevice, d.path)
	}
	return nil
}

// Close releases the device and every claim on it.
func (d *disk) Close() error {
	d.close()
	return nil
}

// read fills p from offset. A device that ends early and a device that fails
// are two errors, and neither is an empty device.
func (d *disk) read(p []byte, offset int64) error {
	buf := make([]byte, len(p)) // of the worker, which may be left behind
	n := 0
	err := d.do(func() (err error) {
		n, err = d.ReadAt(buf, offset)
		switch {
		case n == len(buf):
			return nil
		case err == nil, errors.Is(err, io.EOF):
			return fmt.Errorf("%w: %s ends at byte %d", ErrShortHeader, d.path, offset+int64(n))
		default:
			return fmt.Errorf("%w: read %s at byte %d: %w", ErrIO, d.path, offset, err)
		}
	})
	if err == nil {
		copy(p, buf)
	}
	return err
}

// writeDurably puts p at offset and returns when it will survive a power loss.
// p must not change before the device is closed.
func (d *disk) writeDurably(p []byte, offset int64) error {
	err := d.do(func() error {
		if _, err := d.WriteAt(p, offset); err != nil {
			return fmt.Errorf("%w: write %s at byte %d: %w", ErrIO, d.path, offset, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return d.flush()
}

func (d *disk) flush() error {
	return d.do(func() error {
		if err := d.Sync(); err != nil {
			return fmt.Errorf("%w: flush %s: %w", ErrIO, d.path, err)
		}
		return nil
	})
}

// flushAndForget flushes the device and forgets what is cached of the header, so that the
// next read is answered by the device itself: a page that failed to be written
// stays in the cache and looks like one that was.
func (d *disk) flushAndForget() error {
	if err := d.flush(); err != nil {
		return err
	}
	return d.forget(0, markOffset+sectorSize)
}

// forget drops clean pages from the cache; a length of 0 is to the end.
func (d *disk) forget(offset, length int64) error {
	if d.file == nil {
		return nil
	}
	return d.do(func() error {
		_ = unix.Fadvise(int(d.file.Fd()), offset, length, unix.FADV_DONTNEED) // advice: it cannot be demanded
		return nil
	})
}

// checkSize refuses a device that is too small for a volume.
func (d *disk) checkSize() error {
	if d.size < minDevice {
		return fmt.Errorf("%w: it has %d bytes, needed are %d", ErrDeviceSize, d.size, minDevice)
	}
	return nil
}

// plainBytes is the length of a mapping: whole sectors of 4096 bytes. A partition
// may end within one; what is left over is not used.
func (d *disk) plainBytes() int64 { return d.size&^(dataSectorSize-1) - dataOffset }

// readGuarded reads the bytes that the guard and the MAC cover in whatever form, once.
func (d *disk) readGuarded() ([]byte, error) {
	if d.size < guardedSize {
		return nil, fmt.Errorf("%w: %s has %d bytes", ErrShortHeader, d.path, d.size)
	}
	raw := make([]byte, min(d.size, maxGuardedSize))
	if err := d.read(raw, 0); err != nil {
		return nil, err
	}
	return raw, nil
}
