package luks

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
)

// How much of a device must be zero for it to count as blank.
const (
	blankHead   = 32 << 20 // all of the header, and where filesystems begin
	blankTail   = 1 << 20  // backup partition tables, RAID and ZFS labels
	blankProbes = 256      // evenly spread between the two
	probeSize   = 4096
)

// State is what a device looks like to [Probe].
type State int

// The states of a device. The zero value is none of them.
const (
	// StateBlank: everything that was looked at is zero. It may be formatted if
	// the volume's record allows it.
	StateBlank State = iota + 1
	// StateInterrupted: a format of this very volume was begun, by this DEK and
	// this Identity, and was not completed. It may be formatted again.
	StateInterrupted
	// StateLUKS2: there is a LUKS2 magic. Open or Adopt decides what it is worth.
	StateLUKS2
	// StateOther: anything else. It is never formatted.
	StateOther
)

func (s State) String() string {
	switch s {
	case StateBlank:
		return "blank"
	case StateInterrupted:
		return "interrupted format"
	case StateLUKS2:
		return "LUKS2"
	case StateOther:
		return "other data"
	default:
		return fmt.Sprintf("State(%d)", int(s))
	}
}

// CheckBlank returns nil for a blank device and a [*NotBlankError] for one that
// holds data. It reads the first 32 MiB, the last 1 MiB and 256 pages between
// them, and asks libblkid. A device that cannot be read gives [ErrIO] or
// [ErrShortHeader].
func CheckBlank(ctx context.Context, device string) error {
	d, err := openShared(ctx, device)
	if err == nil {
		defer d.Close()
		err = d.checkBlank(0)
	}
	if err != nil {
		return fmt.Errorf("check that %s is blank: %w", device, err)
	}
	return nil
}

// Fits refuses what no volume can be made on, a plain file or a device that is too small,
// before anybody is told of an attempt to make one. It changes nothing.
func Fits(ctx context.Context, device string) error {
	d, err := openShared(ctx, device)
	if err == nil {
		defer d.Close()
		err = cmp.Or(d.mustBeBlock(), d.checkSize())
	}
	if err != nil {
		return fmt.Errorf("make a volume on %s: %w", device, err)
	}
	return nil
}

// Probe says what stands on a device, without changing it. The DEK may be nil;
// an interrupted format cannot be told from other data then.
func Probe(ctx context.Context, device string, id Identity, dek *Key) (State, error) {
	state, err := probeState(ctx, device, id, dek)
	if err != nil {
		return 0, fmt.Errorf("probe %s: %w", device, err)
	}
	return state, nil
}

func probeState(ctx context.Context, device string, id Identity, dek *Key) (State, error) {
	if dek != nil {
		if err := cmp.Or(id.validate(), validateKey(dek)); err != nil {
			return 0, err
		}
	}
	d, err := openShared(ctx, device)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	return d.state(id, dek)
}

// state classifies a device, and is the only place that does: what Probe
// reports and what Write acts on cannot differ.
func (d *disk) state(id Identity, dek *Key) (State, error) {
	sector := make([]byte, sectorSize)
	if err := d.read(sector, 0); err != nil {
		return 0, err
	}
	if isLUKS2(sector) {
		return StateLUKS2, nil
	}
	ours, err := markerVerifies(sector, id, dek)
	if err != nil {
		return 0, err
	}
	state, skip := StateBlank, int64(0)
	if ours {
		// An interrupted format wrote nothing beyond the guarded bytes. Data
		// there is not from it, and is kept.
		state, skip = StateInterrupted, maxGuardedSize
	}
	switch err := d.checkBlank(skip); {
	case err == nil:
		return state, nil
	case errors.Is(err, ErrNotBlank):
		return StateOther, nil
	default:
		return 0, err
	}
}

// checkBlank looks at a device from byte skip on. Behind a header of ours, which is
// what a skip is for, a filesystem mark is no data.
//
// It asks the device and not the cache: what another machine has written since, or this one
// through a mapping, is not in it.
func (d *disk) checkBlank(skip int64) error {
	if err := d.forget(0, 0); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	look := func(from, to int64) error {
		for at := max(from, skip); at < to; at += int64(len(buf)) {
			p := buf[:min(int64(len(buf)), to-at)]
			if err := d.read(p, at); err != nil {
				return err
			}
			if mark := markOffset - at; skip > 0 && mark >= 0 && mark+sectorSize <= int64(len(p)) && isMark(p[mark:]) {
				clear(p[mark : mark+sectorSize])
			}
			if !allZero(p) {
				return d.whatIs(p, at)
			}
		}
		return nil
	}
	head, tail := min(blankHead, d.size), max(0, d.size-blankTail)
	if err := look(0, head); err != nil {
		return err
	}
	if step := (tail - head) / (blankProbes + 1) &^ (probeSize - 1); step >= probeSize {
		for i := int64(1); i <= blankProbes; i++ {
			if err := look(head+i*step, min(head+i*step+probeSize, tail)); err != nil {
				return err
			}
		}
	} else if err := look(head, tail); err != nil {
		return err
	}
	if err := look(max(tail, head), d.size); err != nil {
		return err
	}
	return d.nothingKnown(skip)
}

// nothingKnown refuses a device on which somebody is known to have left a mark
// between the pages that were looked at: a backup of a superblock.
func (d *disk) nothingKnown(skip int64) error {
	found, err := d.signatures()
	if err != nil {
		return err
	}
	for _, s := range found {
		if s.Offset >= skip {
			return &NotBlankError{Offset: s.Offset, Found: s.String()}
		}
	}
	return nil
}

// whatIs describes p, which stands at byte at and is not zero.
func (d *disk) whatIs(p []byte, at int64) error {
	refusal := &NotBlankError{Offset: at + int64(len(p)-len(bytes.TrimLeft(p, "\x00"))), Found: "data"}
	switch found, err := d.signatures(); {
	case at == 0 && isMarker(p):
		refusal.Found = "a format marker that does not verify"
	case err == nil && len(found) > 0:
		// Naming it is a courtesy; the refusal does not depend on it.
		refusal.Offset, refusal.Found = found[0].Offset, found[0].String()
	}
	return refusal
}
