package luks

import (
	"cmp"
	"context"
	"fmt"

	"github.com/keyagent/keyagent/internal/secret"
)

// FormatOptions is reserved for choices that version 1 of the format does not
// offer. The zero value is the only one.
type FormatOptions struct{}

// Format puts a LUKS2 header on a blank device and returns its MAC, which the
// caller records before it trusts the volume with data.
//
// The caller must hold a record that says that this volume is to be formatted.
// Format itself refuses every device that is not blank with [ErrNotBlank], one
// that is in use with [ErrDeviceBusy], and one below 17 MiB, or of a size that
// is no multiple of 4096, with [ErrDeviceSize].
// The one exception to blank is a device that carries the format marker of this
// very DEK and Identity: a format that was interrupted, and is done anew.
//
// Format may be killed at any point. Afterwards [Probe] says StateBlank or
// StateInterrupted, and Format does it; or StateLUKS2, and [Adopt] has the MAC.
// It assumes what disks promise: that 512 aligned bytes are written whole or not
// at all, and that what was flushed stays.
func Format(ctx context.Context, device string, id Identity, dek *secret.Bytes, _ FormatOptions) (MAC, error) {
	mac, err := format(ctx, device, id, dek)
	if err != nil {
		return MAC{}, fmt.Errorf("format volume %q: %w", id.Volume, err)
	}
	return mac, nil
}

func format(ctx context.Context, device string, id Identity, dek *secret.Bytes) (MAC, error) {
	if err := cmp.Or(id.validate(), validateKey(dek)); err != nil {
		return MAC{}, err
	}
	release, err := volumes.acquire(ctx, id.Volume)
	if err != nil {
		return MAC{}, err
	}
	defer release()
	d, err := openExclusive(device)
	if err != nil {
		return MAC{}, err
	}
	defer d.Close()
	return d.format(ctx, id, dek, newHeader)
}

// format is the sequence of writes. Each step is durable before the next one
// begins, and only the last one makes a header of what is there.
func (d *disk) format(ctx context.Context, id Identity, dek *secret.Bytes, header headerMaker) (MAC, error) {
	if err := d.checkSize(); err != nil {
		return MAC{}, err
	}
	state, err := d.state(ctx, id, dek)
	if err != nil {
		return MAC{}, err
	}
	switch state {
	case StateBlank, StateInterrupted:
	default:
		if err := d.checkBlank(ctx, 0); err != nil {
			return MAC{}, err
		}
		return MAC{}, &NotBlankError{Found: state.String()}
	}

	// The header is made first: if libcryptsetup fails, the disk is as it was.
	g, err := header(id, dek)
	if err != nil {
		return MAC{}, err
	}
	mac, err := headerMAC(g, id, dek)
	if err != nil {
		return MAC{}, err
	}
	marker, err := newMarker(id, dek)
	if err != nil {
		return MAC{}, err
	}
	if err := ctx.Err(); err != nil {
		return MAC{}, err
	}
	// The marker of an interrupted format is written again: it may have been seen
	// in the cache only, and must not be lost while what follows it stays.
	if err := d.writeDurably(marker, 0); err != nil {
		return MAC{}, err
	}
	if err := d.writeDurably(g.raw[sectorSize:], sectorSize); err != nil {
		return MAC{}, err
	}
	if err := d.writeDurably(g.raw[:sectorSize], 0); err != nil {
		return MAC{}, err
	}
	return mac, nil
}

// headerMaker is newHeader, or a test's quicker one.
type headerMaker func(Identity, *secret.Bytes) (guarded, error)

// newHeader makes a header in memory, with a fresh volume key in a keyslot under
// the DEK, and holds it against the guard and the DEK like one from a disk.
func newHeader(id Identity, dek *secret.Bytes) (guarded, error) {
	made, err := newHeaderCopy()
	if err != nil {
		return guarded{}, err
	}
	defer made.Close()
	err = withSession(made.path(), "", func(s *session) error {
		if err := s.format(id.UUID); err != nil {
			return err
		}
		return s.addKeyslot(dek)
	})
	if err != nil {
		return guarded{}, fmt.Errorf("make header: %w", err)
	}
	raw, err := made.guardedBytes()
	if err != nil {
		return guarded{}, err
	}
	g, err := guard(raw)
	if err == nil && g.uuid != id.UUID {
		err = mismatch(g, id)
	}
	if err == nil {
		err = prove(g, dek)
	}
	if err != nil {
		return guarded{}, fmt.Errorf("check the header just made: %w", err)
	}
	return g, nil
}
