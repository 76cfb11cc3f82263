package luks

import (
	"cmp"
	"context"
	"errors"
	"fmt"
)

// cutKind is the target of a mapping that was cut off its disk: it answers every
// read and write with an error.
const cutKind = "error"

// Cut takes a mapping off its disk for good: what was not written is lost, and every
// read and write fails from then on, also those that waited while it was suspended.
// It is for a volume that another machine may write by now. The mapping stays until
// [Close], so that what is mounted from it can be unmounted.
func Cut(ctx context.Context, name, uuid string) error {
	if err := cut(ctx, name, uuid); err != nil {
		return fmt.Errorf("cut mapping %.80q off its disk: %w", name, err)
	}
	return nil
}

func cut(ctx context.Context, name, uuid string) error {
	live, release, err := claimMapping(ctx, name, uuid)
	if errors.Is(err, ErrNotActive) {
		return cmp.Or(cutTags(ctx, name, uuid), err) // the lower one of two may be left
	}
	if err != nil {
		return err
	}
	defer release()
	sectors, err := liveSectors(live, name)
	if err != nil {
		return err
	}
	return errors.Join(intoError(ctx, live, name, sectors), cutTags(ctx, name, uuid), forgetProof(ctx, name, uuid))
}

// intoError gives a mapping a table that answers everything with an error.
func intoError(ctx context.Context, live liveMapping, name string, sectors int64) error {
	return kernelCall(ctx, "cutting "+name, func() error {
		load := dmCall{command: dmTableLoad, targets: 1, payload: target(sectors, cutKind, "")}
		if _, err := load.on(name, live.uuid).run(); err != nil {
			return fmt.Errorf("load its table: %w", err)
		}
		// The kernel stops it, without waiting for what is under way, exchanges the
		// table, which drops the key, and lets it go on into the error.
		return resume(ctx, name, live.uuid, dmSkipLockFS|dmNoFlush)
	}, nil)
}

// liveSectors is the length of a mapping, also of one that is suspended.
func liveSectors(live liveMapping, name string) (int64, error) {
	if len(live.table) != 1 {
		return 0, fmt.Errorf("%w: %s has %d targets", ErrTableMismatch, name, len(live.table))
	}
	return int64(live.table[0].length), nil
}

// cutMapping describes a mapping that was cut off, or says that it was not.
func cutMapping(live liveMapping, name, uuid string) (Mapping, bool) {
	if len(live.table) != 1 || live.table[0].kind != cutKind {
		return Mapping{}, false
	}
	return Mapping{Name: name, Path: "/dev/mapper/" + name, UUID: uuid, Device: live.dev, Bytes: int64(live.table[0].length) * sectorSize,
		ReadOnly: live.readOnly, InUse: live.open > 0, Cut: true}, true
}

// ClearFilesystemMark removes the mark of whatever attempt from a volume that holds
// data by now. Without a mark nothing is written.
func ClearFilesystemMark(ctx context.Context, device string) error {
	d, err := openShared(ctx, device)
	if err != nil {
		return fmt.Errorf("look for the filesystem mark: %w", err)
	}
	sector, err := d.readMark()
	d.Close()
	if err != nil || !isMark(sector) {
		return err
	}
	return (&FilesystemMark{}).Clear(ctx, device)
}
