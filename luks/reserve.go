package luks

import (
	"context"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Persistent reservations, by the kernel's calls for SCSI and NVMe disks alike
// (linux/pr.h). A disk that has one held by another machine fails this machine's
// writes, whatever this machine believes.

const (
	prRegister = 0x401870c8
	prReserve  = 0x401070c9
	prRelease  = 0x401070ca
	prClear    = 0x401070cd

	prWriteExclusive = 1
	prIgnoreKey      = 1 // what an earlier life of this machine registered is replaced
)

type (
	prRegistration struct {
		oldKey, newKey uint64
		flags, _       uint32
	}
	prReservation struct {
		key         uint64
		kind, flags uint32
	}
	prClearing struct {
		key      uint64
		flags, _ uint32
	}
)

// reservable is a device that has persistent reservations. Tests put one in memory
// in place of the kernel's.
type reservable interface {
	reservation(command uintptr, argument unsafe.Pointer) (status int, err error)
}

// Reserve registers key with a device and takes its write-exclusive reservation: no
// other machine can write to it until release is called. [ErrReserved] means that
// another key holds it, [ErrNoReservations] that the device knows none. Key is not
// zero, differs from machine to machine and is the same when this machine comes back.
func Reserve(ctx context.Context, device string, key uint64) (release func() error, err error) {
	err = withReservable(ctx, device, func(r reservable) error { return reserve(r, key) })
	if err != nil {
		return nil, fmt.Errorf("reserve %s: %w", device, err)
	}
	return func() error {
		err := withReservable(context.WithoutCancel(ctx), device, func(r reservable) error { return unreserve(r, key) })
		if err != nil {
			return fmt.Errorf("release reservation of %s: %w", device, err)
		}
		return nil
	}, nil
}

// Seize is Reserve for a machine that the key service named as the writer: whatever
// another machine registered is cleared first, and that machine's writes fail from
// then on.
func Seize(ctx context.Context, device string, key uint64) (release func() error, err error) {
	err = withReservable(ctx, device, func(r reservable) error { return clearAll(r, key) })
	if err != nil {
		return nil, fmt.Errorf("take over reservation of %s: %w", device, err)
	}
	return Reserve(ctx, device, key)
}

func reserve(r reservable, key uint64) error {
	if key == 0 {
		return fmt.Errorf("%w: a reservation's key is not zero", ErrInvalid)
	}
	if err := pr(r, "register", prRegister, unsafe.Pointer(&prRegistration{newKey: key, flags: prIgnoreKey})); err != nil {
		return err
	}
	err := pr(r, "reserve", prReserve, unsafe.Pointer(&prReservation{key: key, kind: prWriteExclusive}))
	if err != nil {
		return errors.Join(err, unregister(r, key))
	}
	return nil
}

// clearAll needs nobody else's key: any machine that is registered may clear.
func clearAll(r reservable, key uint64) error {
	if key == 0 {
		return fmt.Errorf("%w: a reservation's key is not zero", ErrInvalid)
	}
	if err := pr(r, "register", prRegister, unsafe.Pointer(&prRegistration{newKey: key, flags: prIgnoreKey})); err != nil {
		return err
	}
	return pr(r, "clear", prClear, unsafe.Pointer(&prClearing{key: key}))
}

func unreserve(r reservable, key uint64) error {
	err := pr(r, "release", prRelease, unsafe.Pointer(&prReservation{key: key, kind: prWriteExclusive}))
	return errors.Join(err, unregister(r, key))
}

func unregister(r reservable, key uint64) error {
	return pr(r, "unregister", prRegister, unsafe.Pointer(&prRegistration{oldKey: key}))
}

// Status codes of the devices. Those of SCSI are in the lowest byte of what the
// kernel returns; it leaves its own remarks in those above.
const (
	scsiCheck    = 0x02 // of registering: the disk does not know the command
	scsiConflict = 0x18 // another machine's reservation is in the way
	nvmeConflict = 0x83
)

func pr(r reservable, what string, command uintptr, argument unsafe.Pointer) error {
	status, err := r.reservation(command, argument)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w: %s: %w", ErrNoReservations, what, err)
	case command == prRegister && status&0xff == scsiCheck:
		return fmt.Errorf("%w: %s: the disk refuses", ErrNoReservations, what)
	case errors.Is(err, unix.EBADE), errors.Is(err, unix.EBUSY), status&0xff == scsiConflict, status&0x7ff == nvmeConflict:
		return fmt.Errorf("%w: %s", ErrReserved, what)
	case err != nil:
		return fmt.Errorf("%w: %s: %w", ErrIO, what, err)
	case status != 0:
		return fmt.Errorf("%w: %s: the device says %#x", ErrIO, what, status)
	}
	return nil
}

func withReservable(ctx context.Context, device string, f func(reservable) error) error {
	d, err := openWritable(ctx, device)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.mustBeBlock(); err != nil {
		return err
	}
	return d.do(func() error { return f(d) })
}

func (d *disk) reservation(command uintptr, argument unsafe.Pointer) (int, error) {
	status, _, errno := unix.Syscall(unix.SYS_IOCTL, d.file.Fd(), command, uintptr(argument))
	if errno != 0 {
		return 0, errno
	}
	return int(status), nil
}
