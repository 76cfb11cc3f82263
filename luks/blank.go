package luks

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/internal/secret"
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
// them. A device that cannot be read gives [ErrIO] or [ErrShortHeader].
func CheckBlank(ctx context.Context, device string) error {
	d, err := openShared(device)
	if err == nil {
		defer d.Close()
		err = d.checkBlank(ctx, 0)
	}
	if err != nil {
		return fmt.Errorf("check that %s is blank: %w", device, err)
	}
	return nil
}

// Probe says what stands on a device, without changing it. The DEK may be nil;
// an interrupted format cannot be told from other data then.
func Probe(ctx context.Context, device string, id Identity, dek *secret.Bytes) (State, error) {
	state, err := probe(ctx, device, id, dek)
	if err != nil {
		return 0, fmt.Errorf("probe %s: %w", device, err)
	}
	return state, nil
}

func probe(ctx context.Context, device string, id Identity, dek *secret.Bytes) (State, error) {
	if dek != nil {
		if err := id.validate(); err != nil {
			return 0, err
		}
		if err := validateKey(dek); err != nil {
			return 0, err
		}
	}
	d, err := openShared(device)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	return d.state(ctx, id, dek)
}

// state classifies a device, and is the only place that does: what Probe
// reports and what Format acts on cannot differ.
func (d *disk) state(ctx context.Context, id Identity, dek *secret.Bytes) (State, error) {
	sector := make([]byte, sectorSize)
	if err := d.read(sector, 0); err != nil {
		return 0, err
	}
	if bytes.HasPrefix(sector, []byte("LUKS\xba\xbe\x00\x02")) {
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
		state, skip = StateInterrupted, guardedSize
	}
	switch err := d.checkBlank(ctx, skip); {
	case err == nil:
		return state, nil
	case errors.Is(err, ErrNotBlank):
		return StateOther, nil
	default:
		return 0, err
	}
}

// checkBlank looks at a device from byte skip on.
func (d *disk) checkBlank(ctx context.Context, skip int64) error {
	buf := make([]byte, 1<<20)
	look := func(from, to int64) error {
		for at := max(from, skip); at < to; at += int64(len(buf)) {
			if err := ctx.Err(); err != nil {
				return err
			}
			p := buf[:min(int64(len(buf)), to-at)]
			if err := d.read(p, at); err != nil {
				return err
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
	return look(max(tail, head), d.size)
}

// signatures are the tenants that an operator is most likely to have meant to
// keep. Naming them is a courtesy; the refusal does not depend on it.
var signatures = []struct {
	offset int64
	magic  string
	name   string
}{
	{0, markerMagic, "a format marker that does not verify"},
	{0, "LUKS\xba\xbe\x00\x01", "a LUKS1 header"},
	{0, "LUKS\xba\xbe", "a LUKS2 header"},
	{metadataSize, "SKUL\xba\xbe", "a secondary LUKS2 header"},
	{512, "EFI PART", "a GPT partition table"},
	{510, "\x55\xaa", "a boot sector or partition table"},
	{0x438, "\x53\xef", "an ext filesystem"},
	{0, "XFSB", "an XFS filesystem"},
	{0x10040, "_BHRfS_M", "a Btrfs filesystem"},
	{4086, "SWAPSPACE2", "a swap area"},
	{536, "LVM2 001", "an LVM physical volume"},
}

// whatIs describes p, which stands at byte at and is not zero.
func (d *disk) whatIs(p []byte, at int64) error {
	first := at + int64(len(p)-len(bytes.TrimLeft(p, "\x00")))
	for _, s := range signatures {
		if from := s.offset - at; from >= 0 && from+int64(len(s.magic)) <= int64(len(p)) &&
			bytes.HasPrefix(p[from:], []byte(s.magic)) {
			return &NotBlankError{Offset: s.offset, Found: s.name}
		}
	}
	return &NotBlankError{Offset: first, Found: "data"}
}
