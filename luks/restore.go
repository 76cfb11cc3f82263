package luks

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
)

// RebuildCopy writes the damaged copy of a header anew, made from the other one,
// and returns the header. A header that is whole gives [ErrNotRebuildable], and so
// does one that [ReadHeader] would refuse. The volume may be open.
func RebuildCopy(ctx context.Context, req HeaderRequest, dek *Key) (*Header, error) {
	h, err := rebuildCopy(ctx, req, dek)
	if err != nil {
		return nil, fmt.Errorf("rebuild header of volume %q: %w", req.Identity.Volume, err)
	}
	return h, nil
}

func rebuildCopy(ctx context.Context, req HeaderRequest, dek *Key) (*Header, error) {
	if err := req.validate(dek); err != nil {
		return nil, err
	}
	release, err := volumes.acquire(ctx, req.Identity.Volume)
	if err != nil {
		return nil, err
	}
	defer release()
	d, err := openWritable(ctx, req.Device)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	h, err := d.examine(req.Identity, req.MACs, dek)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotRebuildable, err)
	}
	if h.damaged == undamaged {
		return nil, fmt.Errorf("%w: both copies are good", ErrNotRebuildable)
	}
	at := h.damaged * metadataSize
	if err := d.writeDurably(h.raw[at:at+metadataSize], int64(at)); err != nil {
		return nil, err
	}
	return h, d.readBack(h)
}

// RestoreHeader writes a header from a backup: a backup file, or the start of one. What
// follows the header in it is passed over. It must be the header that the record's MACs were made of, or
// nothing is written. It refuses a device that holds anything but a LUKS header of
// this volume, in whatever state, or nothing that libblkid knows.
func RestoreHeader(ctx context.Context, req HeaderRequest, dek *Key, backup []byte) (*Header, error) {
	h, err := restoreHeader(ctx, req, dek, backup)
	if err != nil {
		return nil, fmt.Errorf("restore header of volume %q: %w", req.Identity.Volume, err)
	}
	return h, nil
}

func restoreHeader(ctx context.Context, req HeaderRequest, dek *Key, backup []byte) (*Header, error) {
	if err := req.validate(dek); err != nil {
		return nil, err
	}
	if len(backup) > BackupSize {
		return nil, fmt.Errorf("%w: a backup has at most %d bytes, this one has %d", ErrInvalid, BackupSize, len(backup))
	}
	h, err := verify(append([]byte(nil), backup[:min(len(backup), maxGuardedSize)]...), req.Identity, req.MACs, dek)
	if err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	h.damaged = undamaged // of the backup; the disk gets both copies
	release, err := volumes.acquire(ctx, req.Identity.Volume)
	if err != nil {
		return nil, err
	}
	defer release()
	return h, writeBack(ctx, req.Device, h)
}

// WriteBack writes the header that a volume was opened with to its device again,
// after [Matches] gave [ErrHeaderChanged]. It needs no key, since h is authentic. It
// refuses what [RestoreHeader] refuses. After until, when another machine may have the volume
// and has perhaps changed its key, it writes nothing any more, with [ErrTooLate].
func WriteBack(ctx context.Context, device string, h *Header, until Deadline) error {
	if h == nil {
		return fmt.Errorf("%w: no header was given", ErrInvalid)
	}
	err := until.check()
	if err == nil {
		err = writeBack(ctx, device, h)
	}
	if err != nil {
		return fmt.Errorf("write header back to %s: %w", device, err)
	}
	return nil
}

func writeBack(ctx context.Context, device string, h *Header) error {
	d, err := openWritable(ctx, device)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.writeBack(h)
}

func (d *disk) writeBack(h *Header) error {
	if err := cmp.Or(d.checkSize(), d.mayRestore(h)); err != nil {
		return err
	}
	// The first sector comes last: half a header is none.
	if err := d.writeDurably(h.raw[sectorSize:], sectorSize); err != nil {
		return err
	}
	if err := d.writeDurably(h.raw[:sectorSize], 0); err != nil {
		return err
	}
	return d.readBack(h)
}

// mayRestore keeps a restore from going over another tenant of the device.
func (d *disk) mayRestore(h *Header) error {
	found, err := d.signatures()
	if err != nil {
		return err
	}
	for _, s := range found {
		switch {
		case s.Offset >= dataOffset: // of the data, which stays as it is
		case s.Type != typeLUKS:
			return &NotBlankError{Offset: s.Offset, Found: s.String()}
		case s.UUID != h.uuid && s.UUID != "":
			return fmt.Errorf("%w: the device has the UUID %.40q, the header %s", ErrVolumeMismatch, s.UUID, h.uuid)
		}
	}
	return nil
}

// Matches compares the header on the device, as the device gives it and not the
// cache, with the one that the volume was opened with. [ErrHeaderChanged] means that
// they differ. It needs no key: it may be called while the volume is open, as often
// as one likes.
func Matches(ctx context.Context, device string, h *Header) error {
	if h == nil {
		return fmt.Errorf("%w: no header was given", ErrInvalid)
	}
	if err := matches(ctx, device, h); err != nil {
		return fmt.Errorf("compare header of %s: %w", device, err)
	}
	return nil
}

func matches(ctx context.Context, device string, h *Header) error {
	d, err := openShared(ctx, device)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.forget(0, maxGuardedSize); err != nil {
		return err
	}
	raw, err := d.readGuarded()
	if err != nil {
		return err
	}
	if bytes.HasPrefix(raw, h.raw) {
		return nil
	}
	for i, name := range copyNames {
		at := i * metadataSize
		if !bytes.Equal(raw[at:at+metadataSize], h.raw[at:at+metadataSize]) {
			return fmt.Errorf("%w: its %s copy differs", ErrHeaderChanged, name)
		}
	}
	return fmt.Errorf("%w: its keyslot differs", ErrHeaderChanged)
}
