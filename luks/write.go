package luks

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
)

// WriteRequest names a blank device and the header that it is to have.
type WriteRequest struct {
	Device   string
	Identity Identity
	Header   *Header  // that NewHeader made for this Identity
	Until    Deadline // of the record that names this attempt
}

// Write puts a header that [NewHeader] made on a blank device.
//
// The caller holds a record that names this attempt and the header's MACs, and that
// nobody else may act upon before Until. Write looks at Until before it writes
// anything, and again before the write that makes a header of what is there: a
// machine that was frozen in between gives [ErrTooLate] and has at worst changed the
// first 284 KiB of the device, or 408 KiB with integrity, and what is kept of a clone.
//
// Write refuses every device that is not blank with [ErrNotBlank], one that is in
// use with [ErrDeviceBusy], one below 17 MiB with [ErrDeviceSize] and anything but a
// writable block device. Two things count as blank: the format marker of this very
// DEK and Identity, and a complete header that the DEK opens, in front of a data
// area that nobody has written to. Both are left by an earlier attempt. A header that
// [NewCloneHeader] made replaces that of its source instead, and no other.
//
// Write may be killed at any point. Afterwards [Probe] says StateBlank or
// StateInterrupted, and Write does it; or StateLUKS2, and [Adopt] has the header.
// It assumes what disks promise: that 512 aligned bytes are written whole or not
// at all, and that what was flushed stays. What was written is read back from the
// device before Write returns.
func Write(ctx context.Context, req WriteRequest, dek *Key) error {
	if err := write(ctx, req, dek); err != nil {
		return fmt.Errorf("write header of volume %q: %w", req.Identity.Volume, err)
	}
	return nil
}

func write(ctx context.Context, req WriteRequest, dek *Key) error {
	if err := belongs(req.Header, req.Identity, dek); err != nil {
		return err
	}
	release, err := volumes.acquire(ctx, req.Identity.Volume)
	if err != nil {
		return err
	}
	defer release()
	d, err := openExclusive(ctx, req.Device)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.mustBeBlock(); err != nil {
		return err
	}
	return d.write(req.Identity, dek, req.Header, req.Until.check)
}

// belongs makes sure that a header is of this volume and this DEK.
func belongs(h *Header, id Identity, dek *Key) error {
	if err := cmp.Or(id.validate(), validateKey(dek)); err != nil {
		return err
	}
	if h == nil {
		return fmt.Errorf("%w: no header was given", ErrInvalid)
	}
	return authenticate(guarded{raw: h.raw, uuid: h.uuid}, id, h.macs.Header, dek)
}

// write is the sequence of writes. Each step is durable before the next one
// begins, and only the last one makes a header of what is there.
func (d *disk) write(id Identity, dek *Key, h *Header, inTime func() error) error {
	if err := cmp.Or(d.checkSize(), inTime()); err != nil {
		return err
	}
	mayReplace := d.mayReplace
	if h.source != nil {
		mayReplace = d.mayReplaceSource
	}
	stands, err := mayReplace(id, dek, h)
	if err != nil {
		return err
	}
	if !stands {
		if err := d.writeSteps(id, dek, h, inTime); err != nil {
			return err
		}
	}
	return d.readBack(h)
}

func (d *disk) writeSteps(id Identity, dek *Key, h *Header, inTime func() error) error {
	marker, err := newMarker(id, dek)
	if err != nil {
		return err
	}
	if err := inTime(); err != nil {
		return err
	}
	if err := d.clearMark(); err != nil {
		return err
	}
	if h.source != nil {
		if err := d.keepSource(id, dek, h); err != nil {
			return err
		}
		if err := inTime(); err != nil {
			return err
		}
	}
	// The marker of an interrupted format is written again: it may have been seen
	// in the cache only, and must not be lost while what follows it stays.
	if err := d.writeDurably(marker, 0); err != nil {
		return err
	}
	if err := d.writeDurably(h.raw[sectorSize:], sectorSize); err != nil {
		return err
	}
	if err := inTime(); err != nil {
		return err
	}
	return d.writeDurably(h.raw[:sectorSize], 0)
}

// mayReplace says whether the header stands on the device already, and refuses a
// device that may not be written to.
func (d *disk) mayReplace(id Identity, dek *Key, h *Header) (stands bool, err error) {
	state, err := d.state(id, dek)
	if err != nil {
		return false, err
	}
	switch state {
	case StateBlank, StateInterrupted:
		return false, nil
	case StateLUKS2:
	default:
		return false, cmp.Or(d.checkBlank(0), error(&NotBlankError{Found: state.String()}))
	}
	raw, err := d.readGuarded()
	if err != nil {
		return false, err
	}
	if bytes.HasPrefix(raw, h.raw) {
		return true, nil
	}
	// Somebody who knows the DEK wrote it: an attempt that came to its end and was
	// given up. Nothing was stored behind it.
	switch _, err := vouch(raw, id, dek); {
	case errors.Is(err, ErrHeaderRefused), errors.Is(err, ErrVolumeMismatch), errors.Is(err, ErrWrongKey):
		return false, fmt.Errorf("%w, and it cannot be replaced: %w", &NotBlankError{Found: "a LUKS2 header"}, err)
	case err != nil:
		return false, err
	}
	return false, d.checkBlank(maxGuardedSize)
}

// readBack compares what the device gives back with what was written to it.
func (d *disk) readBack(h *Header) error {
	if err := d.flushAndForget(); err != nil {
		return err
	}
	raw, err := d.readGuarded()
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(raw, h.raw) {
		return fmt.Errorf("%w: %s gives back something else than what was written", ErrIO, d.path)
	}
	return nil
}
