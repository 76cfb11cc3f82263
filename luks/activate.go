package luks

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// creation is a mapping that is to be made: an empty one with its name and UUID, its
// table, the switch to that table, its node.
type creation struct {
	name, uuid string // of the device-mapper
	kind       string // of the target
	readOnly   bool
	bytes      int64
	params     string
	private    bool // nobody else has to look at it
}

// create makes the mapping, on the calling thread, in whose keyring the key is. On
// an error there is none.
func (c creation) create(ctx context.Context) error {
	_, err := dmCall{command: dmDevCreate, name: c.name, uuid: c.uuid}.run()
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: %s, or its UUID %s", ErrNameTaken, c.name, c.uuid)
	}
	if err != nil {
		return fmt.Errorf("create mapping %s: %w", c.name, err)
	}
	if err := c.load(); err != nil {
		return errors.Join(err, remove(ctx, c.name, c.uuid))
	}
	if err := c.resume(ctx); err != nil {
		return errors.Join(err, remove(ctx, c.name, c.uuid))
	}
	return nil
}

func (c creation) mode() uint32 {
	if c.readOnly {
		return dmReadOnly
	}
	return 0
}

// load gives the mapping a table, which resume puts in force.
func (c creation) load() error {
	call := dmCall{
		command: dmTableLoad, uuid: c.uuid, flags: dmSecureData | c.mode(),
		targets: 1, payload: target(c.bytes/sectorSize, c.kind, c.params),
	}
	_, err := call.run()
	// As for a claim: a program that this process starts may have a copy of the descriptor
	// by which the device was claimed a moment ago.
	for try := 0; errors.Is(err, unix.EBUSY) && try < claimTries; try++ {
		time.Sleep(claimPause)
		_, err = call.run()
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: the device below %s is mounted, mapped or claimed", ErrDeviceBusy, c.name)
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: open %s read-only", ErrReadOnlyDevice, c.name)
	case c.kind != cryptKind && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT)):
		return fmt.Errorf("%w: dm-integrity (CONFIG_DM_INTEGRITY), unless the disk below %s is smaller than it was: %w", ErrKernel, c.name, err)
	case taggedForm(c.params) != nil && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT)):
		return fmt.Errorf("%w: %s: %w", ErrKernel, taggedForm(c.params).needs, err)
	case err != nil:
		return fmt.Errorf("load the table of %s: %w", c.name, err)
	}
	return nil
}

func (c creation) resume(ctx context.Context) error {
	udev, err := newCookie()
	if err != nil {
		return err
	}
	if c.private {
		udev.event |= udevLooksAway
	}
	return udev.resume(ctx, c.name, c.uuid, dmSkipLockFS|c.mode())
}

// resume puts the newest table in force, and waits for udev to know it.
func resume(ctx context.Context, name, uuid string, flags uint32) error {
	udev, err := newCookie()
	if err != nil {
		return err
	}
	return udev.resume(ctx, name, uuid, flags)
}

func (udev cookie) resume(ctx context.Context, name, uuid string, flags uint32) error {
	answer, err := dmCall{command: dmDevSuspend, flags: flags, event: udev.event}.on(name, uuid).run()
	if err != nil {
		udev.drop()
		return fmt.Errorf("resume mapping %s: %w", name, err)
	}
	udev.wait(ctx, answer)
	return nil
}

// remove removes a mapping by its UUID, or by its name if it has none.
func remove(ctx context.Context, name, uuid string) error {
	udev, err := newCookie()
	if err != nil {
		return err
	}
	answer, err := dmCall{command: dmDevRemove, event: udev.event}.on(name, uuid).run()
	if err != nil {
		udev.drop()
	}
	switch {
	case err == nil:
		udev.wait(ctx, answer)
		return nil
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %s is in use", ErrDeviceBusy, name)
	case errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: %s", ErrNotActive, name)
	default:
		return fmt.Errorf("remove mapping %s: %w", name, err)
	}
}
