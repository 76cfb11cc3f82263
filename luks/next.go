package luks

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
)

// A volume gets another DEK by a header of the same volume key, under that DEK. The
// guard knows no header with two keyslots: the next header stands whole between the
// present one and the data before it takes its place, so that at each moment one of the
// two is on the disk, with one keyslot, under a MAC of its own.

// nextOffset is where it stands meanwhile: libblkid and cryptsetup look for nothing
// there.
const nextOffset = 6 << 20

// NewNextHeader makes the header in memory that is to follow h: of the same volume, with
// the key of its data, in a keyslot under the DEK next. Of a header of version 1 it makes
// one of version 2.
func NewNextHeader(ctx context.Context, h *Header, id Identity, dek, next *Key) (*Header, error) {
	n, err := newNextHeader(ctx, h, id, dek, next)
	if err != nil {
		return nil, fmt.Errorf("make the next header of volume %q: %w", id.Volume, err)
	}
	return n, nil
}

func newNextHeader(ctx context.Context, h *Header, id Identity, dek, next *Key) (*Header, error) {
	if err := cmp.Or(validateKey(next), belongs(h, id, dek)); err != nil {
		return nil, err
	}
	vk, err := h.volumeKey(dek)
	if err != nil {
		return nil, err
	}
	defer vk.Close()
	return makeHeader(ctx, id, content{form: h.form, bytes: h.bytes, key: vk}, next)
}

// KeepNext puts the header that is to come beside the one that is there, durably, and
// reads it back. The volume may be open. Nothing that opens a volume looks there unless
// its record says so.
//
// After until, when another machine may have the volume, it writes nothing any more, with
// [ErrTooLate]; and so do PutNext and ForgetNext.
func KeepNext(ctx context.Context, device string, next *Header, until Deadline) error {
	return onNext(ctx, "keep the next header on", device, next, func(d *disk, next *Header) error {
		return d.keepNext(next, until.check)
	})
}

// keepNext writes the first sector first, and forgetNext removes it last: while it is
// there, something may be left.
func (d *disk) keepNext(next *Header, inTime func() error) error {
	if err := inTime(); err != nil {
		return err
	}
	if err := d.writeDurably(next.raw[:sectorSize], nextOffset); err != nil {
		return err
	}
	if err := d.writeDurably(next.raw[sectorSize:], nextOffset+sectorSize); err != nil {
		return err
	}
	return d.readBackAt(next, nextOffset)
}

// PutNext puts the header that [KeepNext] kept in the place of the present one, whose
// keyslot is thereby destroyed. It may be cut off at any point: then the kept one is
// whole still, and PutNext does it again. It refuses what [RestoreHeader] refuses, and
// a device on which that very header is not kept: [ErrHeaderChanged].
func PutNext(ctx context.Context, device string, next *Header, until Deadline) error {
	return onNext(ctx, "put the next header in front on", device, next, func(d *disk, next *Header) error {
		return d.putNext(next, until.check)
	})
}

func (d *disk) putNext(next *Header, inTime func() error) error {
	if err := d.readBackAt(next, nextOffset); err != nil {
		return err
	}
	if err := inTime(); err != nil {
		return err
	}
	return d.writeBack(next)
}

// onNext opens a device for writing although dm-crypt has claimed it.
func onNext(ctx context.Context, what, device string, next *Header, f func(*disk, *Header) error) error {
	err := fmt.Errorf("%w: no header was given", ErrInvalid)
	if next != nil {
		var d *disk
		if d, err = openWritable(ctx, device); err == nil {
			defer d.Close()
			if err = d.checkSize(); err == nil {
				err = f(d, next)
			}
		}
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", what, device, err)
	}
	return nil
}

// NextHeader returns the header that [KeepNext] kept on a device: it must satisfy the
// guard, carry the volume's UUID and match these MACs under the DEK that is to come.
// One that is not there is refused as one that is damaged is.
func NextHeader(ctx context.Context, req HeaderRequest, next *Key) (*Header, error) {
	h, err := nextHeader(ctx, req, next)
	if err != nil {
		return nil, fmt.Errorf("read the next header of volume %q: %w", req.Identity.Volume, err)
	}
	return h, nil
}

func nextHeader(ctx context.Context, req HeaderRequest, next *Key) (*Header, error) {
	if err := req.validate(next); err != nil {
		return nil, err
	}
	d, err := openShared(ctx, req.Device)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.nextHeader(req, next)
}

func (d *disk) nextHeader(req HeaderRequest, next *Key) (*Header, error) {
	if err := d.checkSize(); err != nil {
		return nil, err
	}
	raw := make([]byte, maxGuardedSize)
	if err := cmp.Or(d.forget(nextOffset, maxGuardedSize), d.read(raw, nextOffset)); err != nil {
		return nil, err
	}
	return verify(raw, req.Identity, req.MACs, next)
}

// ForgetNext removes a kept header, once the volume's record has it as the present one.
// Without one there is nothing to do.
func ForgetNext(ctx context.Context, device string, until Deadline) error {
	if err := forgetNext(ctx, device, until); err != nil {
		return fmt.Errorf("remove what a change of the key left on %s: %w", device, err)
	}
	return nil
}

func forgetNext(ctx context.Context, device string, until Deadline) error {
	look, err := openShared(ctx, device)
	if err != nil {
		return err
	}
	defer look.Close()
	if there, err := look.nextIsKept(); err != nil || !there {
		return err
	}
	d, err := openWritable(ctx, device)
	if err != nil {
		return err
	}
	defer d.Close()
	if d.rdev != look.rdev {
		return fmt.Errorf("%w: %s is another device now", ErrVolumeMismatch, device)
	}
	return d.forgetNext(until.check)
}

func (d *disk) nextIsKept() (bool, error) {
	sector := make([]byte, sectorSize)
	err := cmp.Or(d.forget(nextOffset, sectorSize), d.read(sector, nextOffset))
	return !allZero(sector), err
}

func (d *disk) forgetNext(inTime func() error) error {
	if err := inTime(); err != nil {
		return err
	}
	if err := d.writeDurably(make([]byte, maxGuardedSize-sectorSize), nextOffset+sectorSize); err != nil {
		return err
	}
	return d.writeDurably(make([]byte, sectorSize), nextOffset)
}

// readBackAt compares what the device has with a header that was written to it.
func (d *disk) readBackAt(h *Header, at int64) error {
	if err := cmp.Or(d.flush(), d.forget(at, maxGuardedSize)); err != nil {
		return err
	}
	raw := make([]byte, len(h.raw))
	if err := d.read(raw, at); err != nil {
		return err
	}
	if !bytes.Equal(raw, h.raw) {
		return fmt.Errorf("%w: what stands at byte %d is not what was written there", ErrHeaderChanged, at)
	}
	return nil
}
