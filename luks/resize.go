package luks

import (
	"context"
	"fmt"
)

// Resize lets a mapping grow to the size of its device, rounded down to 4096 bytes,
// while it is in use. What is on it grows afterwards, by its own tool. A device that
// has become smaller gives [ErrShrink]; one of the same size is no error.
// An authenticated volume gives [ErrNoGrowth].
func Resize(ctx context.Context, e Existing, dek *Key) (Mapping, error) {
	var grown Mapping
	err := e.with(ctx, dek, func(d *disk, m Mapping, h *Header) (err error) {
		grown, err = d.resize(ctx, m, h, dek)
		return err
	})
	if err != nil {
		return Mapping{}, fmt.Errorf("resize volume %q: %w", e.Identity.Volume, err)
	}
	return grown, nil
}

func (d *disk) resize(ctx context.Context, m Mapping, h *Header, dek *Key) (Mapping, error) {
	switch {
	case m.Suspended:
		return Mapping{}, fmt.Errorf("%w: %s", ErrSuspended, m.Name)
	case h.form.tagged():
		return Mapping{}, fmt.Errorf("%w: %s", ErrNoGrowth, m.Name)
	case d.plainBytes() < m.Bytes:
		return Mapping{}, fmt.Errorf("%w: %d bytes are left of %d", ErrShrink, d.plainBytes(), m.Bytes)
	case d.plainBytes() == m.Bytes:
		return m, nil
	}
	c := creation{
		name: m.Name, uuid: dmUUID(h.uuid, m.Name), kind: cryptKind, readOnly: m.ReadOnly, bytes: d.plainBytes(),
		params: cryptParams(h.form, h.form.volumeKeyRef(h.uuid), d.rdev, dataOffset, m.options()),
	}
	vk, err := h.volumeKey(dek)
	if err != nil {
		return Mapping{}, err
	}
	defer vk.Close()
	err = kernelCall(ctx, "resizing "+m.Name, func() error {
		if err := withVolumeKey(h.uuid, vk, c.load); err != nil {
			return err
		}
		// The kernel suspends, changes the table and resumes by itself. The
		// filesystem need not be frozen for a table that only ends later.
		return resume(ctx, c.name, c.uuid, dmSkipLockFS|c.mode())
	}, nil)
	if err != nil {
		_, _ = dmCall{command: dmTableClear, uuid: c.uuid}.run() // a table that waits for nobody
		return Mapping{}, err
	}
	return d.confirm(m.Name, h, c.bytes, m.options())
}
