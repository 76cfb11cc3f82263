package luks

import (
	"cmp"
	"context"
	"fmt"
)

// Erase destroys every copy of a volume's header on a device: both copies of its metadata, its
// keyslot, and the headers of a change of the key and of a clone's source that may be kept
// behind it. It does not touch the data. Without its header nobody can open the
// volume, not even with its DEK.
//
// The device must be one on which a copy of the header has this UUID, and that nobody uses:
// [ErrVolumeMismatch], [ErrDeviceBusy]. It may be cut off at any point, and be called again:
// the metadata goes last. A device of zeros is erased already. What the disk keeps of blocks
// that were written before, as flash memory does, is out of reach.
func Erase(ctx context.Context, device, uuid string) error {
	if err := erase(ctx, device, uuid); err != nil {
		return fmt.Errorf("erase the header on %s: %w", device, err)
	}
	return nil
}

func erase(ctx context.Context, device, uuid string) error {
	if !uuidPattern.MatchString(uuid) {
		return fmt.Errorf("%w: UUID %.40q", ErrInvalid, uuid)
	}
	d, err := openExclusive(ctx, device)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := cmp.Or(d.checkSize(), d.forget(0, sourceOffset+maxGuardedSize+sectorSize)); err != nil {
		return err
	}
	metadata := make([]byte, areasOffset)
	if err := d.read(metadata, 0); err != nil {
		return err
	}
	if allZero(metadata) {
		return nil
	}
	if !isOf(metadata, uuid) {
		return fmt.Errorf("%w: no copy of a header has the UUID %s", ErrVolumeMismatch, uuid)
	}
	for _, part := range []struct{ at, size int64 }{
		{areasOffset, authAreaSize},
		{nextOffset, maxGuardedSize},
		{sourceOffset, maxGuardedSize + sectorSize},
		{metadataSize, metadataSize},
		{0, metadataSize},
	} {
		if err := d.writeDurably(make([]byte, part.size), part.at); err != nil {
			return err
		}
	}
	if err := d.forget(0, maxGuardedSize); err != nil {
		return err
	}
	left, err := d.readGuarded()
	if err == nil && !allZero(left) {
		err = fmt.Errorf("%w: %s gives back something else than what was written", ErrIO, d.path)
	}
	return err
}

// isOf says whether one of the copies is a header of a volume, whatever else it holds.
func isOf(metadata []byte, uuid string) bool {
	for i := range copyNames {
		if h, err := parseBinary(metadata[i*metadataSize:(i+1)*metadataSize], i); err == nil && h.uuid == uuid {
			return true
		}
	}
	return false
}
