package luks

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"
)

// wipeChunk is what one write of Wipe covers, and edge what it writes at either end of a
// mapping when the rest may stay.
const (
	wipeChunk = 4 << 20
	wipeEdge  = 1 << 20
)

// Wipe writes zeros through the mapping of an authenticated volume that nobody uses yet,
// so that each sector has a tag: until then reading one gives an error. Unless all is
// asked for, it writes the first and the last MiB alone, where tools look for what a
// device holds; that is enough for a filesystem that reads nothing it has not written.
// Progress may be nil, and hears of bytes.
func Wipe(ctx context.Context, m Mapping, all bool, progress func(done, total int64)) error {
	if err := wipe(ctx, m, all, progress); err != nil {
		return fmt.Errorf("wipe %s: %w", m.Name, err)
	}
	return nil
}

func wipe(ctx context.Context, m Mapping, all bool, progress func(done, total int64)) error {
	zero, err := unix.Mmap(-1, 0, wipeChunk, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("memory of zeros: %w", err)
	}
	// Direct, so that an error is that of its write, and the cache stays what it was.
	d, err := openDisk(ctx, m.Path, unix.O_RDWR|unix.O_DIRECT)
	if err != nil {
		_ = unix.Munmap(zero)
		return err
	}
	defer d.Close()
	if d.rdev != m.Device {
		return fmt.Errorf("%w: %s is another device now", ErrVolumeMismatch, m.Path)
	}
	write := func(from, to int64) error {
		for at := from; at < to; at += wipeChunk {
			if err := ctx.Err(); err != nil {
				return err
			}
			err := d.do(func() error {
				_, err := d.WriteAt(zero[:min(wipeChunk, to-at)], at)
				return err
			})
			if err != nil {
				return fmt.Errorf("%w: write at byte %d: %w", ErrIO, at, err)
			}
			if progress != nil {
				progress(min(at+wipeChunk, to), m.Bytes)
			}
		}
		return nil
	}
	if all || m.Bytes <= 2*wipeEdge {
		err = write(0, m.Bytes)
	} else if err = write(0, wipeEdge); err == nil {
		err = write(m.Bytes-wipeEdge, m.Bytes)
	}
	if err == nil {
		err = d.flush()
	}
	if err == nil {
		// A write that was left behind with a hung disk may still use them.
		_ = unix.Munmap(zero)
	}
	return err
}
