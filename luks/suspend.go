package luks

import (
	"context"
	"errors"
	"fmt"
)

// Suspend stops a mapping and wipes its volume key in the kernel. Reads and writes of
// the mapping wait from then on; what was written before has reached the device. The
// filesystem on it is not frozen: what it keeps in memory is written after [Resume].
// Suspending a suspended mapping wipes the key again.
func Suspend(ctx context.Context, name, uuid string) error {
	if err := suspend(ctx, name, uuid); err != nil {
		return fmt.Errorf("suspend mapping %.80q: %w", name, err)
	}
	return nil
}

func suspend(ctx context.Context, name, uuid string) error {
	live, release, err := claimMapping(ctx, name, uuid)
	if err != nil {
		return err
	}
	defer release()
	dm := live.uuid
	err = kernelCall(ctx, "suspending "+name, func() error {
		if !live.suspended {
			_, err := dmCall{command: dmDevSuspend, uuid: dm, flags: dmSuspended | dmSkipLockFS | dmNoFlush}.run()
			if err != nil {
				return fmt.Errorf("stop it: %w", err)
			}
		}
		if _, err := (dmCall{command: dmTargetMsg, uuid: dm, payload: dmMessage("key wipe")}).run(); err != nil {
			return fmt.Errorf("wipe its key: %w", err)
		}
		if live.tags == nil || live.tags.suspended {
			return nil
		}
		return suspendTags(name, uuid)
	}, nil)
	return errors.Join(err, forgetProof(ctx, name, uuid))
}

// Resume gives a suspended mapping its volume key again and lets it go on. The key is
// that of the guarded header, and is proved afterwards; on an error the mapping is
// suspended. Resuming a mapping that is not suspended proves its key.
func Resume(ctx context.Context, e Existing, dek *Key) (Mapping, error) {
	var resumed Mapping
	err := e.with(ctx, dek, func(d *disk, m Mapping, h *Header) (err error) {
		if resumed = m; !m.Suspended {
			return nil
		}
		resumed, err = d.resumeWith(ctx, m, h, dek)
		return err
	})
	if err != nil {
		return Mapping{}, fmt.Errorf("resume volume %q: %w", e.Identity.Volume, err)
	}
	return resumed, nil
}

func (d *disk) resumeWith(ctx context.Context, m Mapping, h *Header, dek *Key) (Mapping, error) {
	vk, err := h.volumeKey(dek)
	if err != nil {
		return Mapping{}, err
	}
	defer vk.Close()
	dm := dmUUID(h.uuid, m.Name)
	stop := func() error {
		_, err := dmCall{command: dmDevSuspend, uuid: dm, flags: dmSuspended | dmSkipLockFS | dmNoFlush}.run()
		if err == nil && m.Integrity != "" {
			err = suspendTags(m.Name, h.uuid)
		}
		return err
	}
	err = kernelCall(ctx, "resuming "+m.Name, func() error {
		if m.Integrity != "" {
			if err := resume(ctx, tagsName(m.Name), tagsUUID(h.uuid, m.Name), 0); err != nil {
				return err
			}
		}
		return withVolumeKey(h.uuid, vk, func() error {
			message := dmMessage("key set " + h.form.volumeKeyRef(h.uuid))
			if _, err := (dmCall{command: dmTargetMsg, uuid: dm, payload: message}).run(); err != nil {
				return fmt.Errorf("set its key: %w", err)
			}
			return resume(ctx, m.Name, dm, 0)
		})
	}, nil)
	if err != nil {
		return Mapping{}, err
	}
	live, err := inspect(m.Name)
	if err == nil {
		if m, err = sameVolume(live, m.Name, Identity{UUID: h.uuid}, d); err == nil {
			err = d.prove(ctx, m, h, dek)
		}
	}
	if err != nil {
		return Mapping{}, errors.Join(err, stop())
	}
	return m, nil
}

// claimMapping takes the lock of a mapping, which must have the UUID of a volume.
func claimMapping(ctx context.Context, name, uuid string) (live liveMapping, release func(), err error) {
	if err := validateName(name); err != nil {
		return live, nil, err
	}
	if release, err = mappings.acquire(ctx, name); err != nil {
		return live, nil, err
	}
	live, err = inspect(name)
	if err == nil && live.uuid != dmUUID(uuid, name) {
		err = fmt.Errorf("%w: it has the UUID %.100q", ErrNameTaken, live.uuid)
	}
	if err != nil {
		release()
	}
	return live, release, err
}
