package luks

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"fmt"
)

// The filesystem mark: one sector that says that an attempt's mkfs is under way. It
// stands between the header and the data, where neither looks. Its layout is in the
// package documentation.
const (
	markMagic  = "KEYAGENT\x00MKFS\x00\x00\x00"
	markOffset = 1 << 20

	offMarkAttempt = 200
)

// FilesystemMark tells a filesystem that was never finished from one that somebody
// uses. It is set before mkfs and cleared after it. It is made while the DEK is
// there, and holds no secret.
type FilesystemMark struct{ sector []byte }

// NewFilesystemMark makes the mark of one attempt to create a volume.
func NewFilesystemMark(id Identity, attempt [16]byte, dek *Key) (*FilesystemMark, error) {
	if err := cmp.Or(id.validate(), validateKey(dek)); err != nil {
		return nil, err
	}
	if attempt == [16]byte{} {
		return nil, fmt.Errorf("%w: the attempt has no ID", ErrInvalid)
	}
	m, err := taggedSector(markMagic, markLabel, id, attempt[:], dek)
	if err != nil {
		return nil, err
	}
	return &FilesystemMark{m}, nil
}

// Claim sets the mark on the device below the volume, durably, where nobody has written
// data, or where this mark or that of an earlier attempt stands: left is what [MarkLeft]
// returned, or nil. Anything else is [ErrNotBlank]. All is read at this moment: since left
// was found, the machine may have been frozen, and another one may have finished the
// volume and use it.
func (m *FilesystemMark) Claim(ctx context.Context, device string, left *FilesystemMark) error {
	return onMark(ctx, device, "set", func(d *disk) error {
		sector, err := d.readMark()
		switch {
		case err != nil:
			return err
		case hmac.Equal(sector, m.sector):
			return nil
		case left != nil && hmac.Equal(sector, left.sector):
		default:
			if err := cmp.Or(markOrNothing(sector), d.checkBlank(dataOffset)); err != nil {
				return err
			}
		}
		return d.writeDurably(m.sector, markOffset)
	})
}

// Clear removes the mark, durably. Without a mark there is nothing to do.
func (m *FilesystemMark) Clear(ctx context.Context, device string) error {
	return onMark(ctx, device, "clear", func(d *disk) error {
		sector, err := d.readMark()
		if err = cmp.Or(err, markOrNothing(sector)); err != nil {
			return err
		}
		return d.writeDurably(make([]byte, sectorSize), markOffset)
	})
}

// MarkLeft returns the mark of any attempt to create this volume that is on the device:
// what stands behind the header was never finished, since a mark is cleared before the
// volume is used. It returns nil if there is none.
func MarkLeft(ctx context.Context, device string, id Identity, dek *Key) (*FilesystemMark, error) {
	d, err := openShared(ctx, device)
	if err != nil {
		return nil, fmt.Errorf("look for a filesystem mark: %w", err)
	}
	defer d.Close()
	sector, err := d.readMark()
	if err != nil {
		return nil, fmt.Errorf("look for a filesystem mark: %w", err)
	}
	attempt := [16]byte(sector[offMarkAttempt:])
	if !isMark(sector) || attempt == [16]byte{} {
		return nil, nil
	}
	want, err := NewFilesystemMark(id, attempt, dek)
	if err != nil || !hmac.Equal(sector, want.sector) {
		return nil, err
	}
	return want, nil
}

// onMark opens a device for writing although dm-crypt has claimed it.
func onMark(ctx context.Context, device, what string, f func(*disk) error) error {
	d, err := openWritable(ctx, device)
	if err == nil {
		defer d.Close()
		if err = cmp.Or(d.mustBeBlock(), d.checkSize()); err == nil {
			err = f(d)
		}
	}
	if err != nil {
		return fmt.Errorf("%s the filesystem mark: %w", what, err)
	}
	return nil
}

func (d *disk) readMark() ([]byte, error) {
	sector := make([]byte, sectorSize)
	return sector, cmp.Or(d.forget(markOffset, sectorSize), d.read(sector, markOffset))
}

func isMark(sector []byte) bool { return bytes.HasPrefix(sector, []byte(markMagic)) }

func markOrNothing(sector []byte) error {
	if !isMark(sector) && !allZero(sector) {
		return &NotBlankError{Offset: markOffset, Found: "data"}
	}
	return nil
}

// clearMark removes the mark of an earlier attempt from a device that is about to
// be formatted.
func (d *disk) clearMark() error {
	sector, err := d.readMark()
	if err != nil || !isMark(sector) {
		return err
	}
	return d.writeDurably(make([]byte, sectorSize), markOffset)
}
