package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/filesystem"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/luks"
)

// work is something done to one volume whose turn is held.
type work func(ctx context.Context, e *entry) error

// with runs f in a volume's turn.
func (c *Volumes) with(ctx context.Context, id string, f work) (Volume, error) {
	e := c.find(id)
	if e == nil || e.spec.ID == "" {
		return Volume{ID: id}, node.UnknownVolume(id)
	}
	give, err := c.take(ctx, id, e)
	if err != nil {
		return c.view(e), err
	}
	defer give()
	ctx = luks.WithPatience(ctx, c.DeviceWait)
	c.reconcile(ctx, id, e)
	err = classify(f(ctx, e))
	return c.view(e), err
}

var errThrowaway = failure.New(failure.State, errors.New("the volume's key ends with its mapping"), "close it and open it again")

// withKey runs f with the key of a volume that exists.
func (c *Volumes) withKey(ctx context.Context, e *entry, f func(*keyclient.Key, luks.Existing) error) error {
	if e.spec.Throwaway() {
		return errThrowaway
	}
	defer c.Keys.Hold()()
	r := keyclient.Request{Volume: e.spec.ID, ReadOnly: e.spec.ReadOnly}
	if known, ok := c.recall(e.spec.ID); ok {
		r.LeaseID = known.LeaseID
	}
	key, err := c.Keys.GetKey(ctx, r)
	if err != nil {
		return err
	}
	defer key.Close()
	c.set(func() { e.lastID = key.CorrelationID })
	if err := c.sameLease(ctx, e, key); err != nil {
		return failure.WithID(err, key.CorrelationID)
	}
	err = c.either(ctx, e.spec.DevicePath(), key, e.spec.ReadOnly, func(kept *luks.Header) error {
		h := cmp.Or(kept, e.header)
		if h != nil && h.MACs() != luksMACs(key.MACs) {
			h = nil // of another key than the present one: what is in front counts
		}
		return f(key, luks.Existing{Device: e.spec.DevicePath(), Name: e.spec.Name, Identity: identity(key), MACs: luksMACs(key.MACs), Header: h})
	})
	if isUp(e.condition.state) {
		c.hold(e, key.Lease)
	} else if key.Lease != nil {
		c.release(ctx, e.spec.ID, key.Lease.ID)
	}
	return failure.WithID(classify(err), key.CorrelationID)
}

func isUp(s State) bool { return s == Open || s == Mounted || s == Suspended }

// Resize makes an open volume, and its filesystem, as large as its device. A volume
// never shrinks. It needs the key service: the kernel wants the volume key again.
func (c *Volumes) Resize(ctx context.Context, id string) (Volume, error) {
	return c.with(ctx, id, func(ctx context.Context, e *entry) error {
		if s := e.condition.state; s != Open && s != Mounted {
			return failure.Newf(failure.State, "open it first", "the volume is %s", s)
		}
		var m luks.Mapping
		err := c.withKey(ctx, e, func(k *keyclient.Key, r luks.Existing) (err error) {
			return c.step(ctx, "resized", func() error { m, err = luks.Resize(ctx, r, k.DEK); return err })
		})
		if err != nil || e.spec.Filesystem == "none" {
			return err
		}
		return c.step(ctx, "grown", func() error { return filesystem.Grow(ctx, m.Path, e.known.Mount, e.spec.Filesystem) })
	})
}

// Suspend stops all I/O of an open volume, and takes its key from the kernel.
func (c *Volumes) Suspend(ctx context.Context, id string) (Volume, error) {
	return c.with(ctx, id, func(ctx context.Context, e *entry) error {
		if e.spec.Throwaway() {
			return errThrowaway
		}
		if s := e.condition.state; !isUp(s) {
			return failure.Newf(failure.State, "open it first", "the volume is %s", s)
		}
		c.withhold(e, false) // by hand it is for good, until somebody resumes it
		if e.condition.state == Suspended {
			return nil
		}
		if err := luks.Suspend(ctx, e.spec.Name, e.known.UUID); err != nil {
			return err
		}
		return c.allowed(e, EventSuspend)
	})
}

// Resume asks the key service for the key of a suspended volume, and lets its I/O
// go on.
func (c *Volumes) Resume(ctx context.Context, id string) (Volume, error) {
	return c.with(ctx, id, func(ctx context.Context, e *entry) error {
		switch e.condition.state {
		case Suspended:
		case Open, Mounted:
			return nil
		default:
			return failure.Newf(failure.State, "open it first", "the volume is %s", e.condition.state)
		}
		err := c.withKey(ctx, e, func(k *keyclient.Key, r luks.Existing) error {
			_, err := luks.Resume(ctx, r, k.DEK)
			return err
		})
		if err != nil {
			return err
		}
		c.warn(e, "fence", "")
		c.withhold(e, false)
		return c.allowed(e, EventResume)
	})
}

// BackupHeader returns the header of a volume as a backup file keeps it. It is not
// secret. The header of an open volume is the one that it was opened with.
func (c *Volumes) BackupHeader(ctx context.Context, id string) (header []byte, err error) {
	_, err = c.with(ctx, id, func(ctx context.Context, e *entry) error {
		if e.header != nil {
			header = e.header.Bytes()
			return nil
		}
		return c.withKey(ctx, e, func(k *keyclient.Key, r luks.Existing) error {
			h, err := luks.ReadHeader(ctx, headerOf(r), k.DEK)
			if err == nil {
				header = h.Bytes()
			}
			return err
		})
	})
	return header, err
}

func headerOf(e luks.Existing) luks.HeaderRequest {
	return luks.HeaderRequest{Device: e.Device, Identity: e.Identity, MACs: e.MACs}
}

// RestoreHeader writes a header back. raw is a backup; without one, the damaged
// copy on the disk is made anew from the good one. Either must be the header that
// the volume's record vouches for.
func (c *Volumes) RestoreHeader(ctx context.Context, id string, raw []byte) (Volume, error) {
	return c.with(ctx, id, func(ctx context.Context, e *entry) error {
		return c.withKey(ctx, e, func(k *keyclient.Key, r luks.Existing) (err error) {
			var h *luks.Header
			if len(raw) == 0 {
				h, err = luks.RebuildCopy(ctx, headerOf(r), k.DEK)
			} else {
				h, err = luks.RestoreHeader(ctx, headerOf(r), k.DEK, raw)
			}
			if err != nil {
				return err
			}
			c.Log.Warn("a header was written back", "volume", id, "from_backup", len(raw) > 0, "uuid", h.UUID())
			c.warn(e, "header", "")
			if isUp(e.condition.state) {
				c.set(func() { e.header = h })
			}
			return nil
		})
	})
}

// throwaway maps a swap area or a scratch filesystem under a key that the kernel
// makes and nobody ever sees.
func (o *opening) throwaway(ctx context.Context) error {
	m, err := luks.Status(ctx, o.v.Name)
	fresh := errors.Is(err, luks.ErrNotActive)
	switch {
	case fresh:
		if err := o.await(ctx); err != nil {
			return err
		}
		m, err = luks.OpenThrowaway(ctx, o.v.DevicePath(), o.v.Name, o.options())
	case err == nil:
		if r, ok := o.recall(o.v.ID); !ok || !m.Throwaway || !o.ours(m, r) {
			err = fmt.Errorf("%w: nothing here remembers that %s was opened", luks.ErrNotOurs, m.Name)
		}
	}
	if err != nil {
		return err
	}
	o.mapping = m
	o.set(func() {
		o.e.known = remembered{Spec: o.v, Dynamic: o.e.dynamic, UUID: m.UUID, Device: m.DataDevice, Sequence: sequence(m.Device)}
	})
	if err := o.rememberKnown(o.e); err != nil {
		return err
	}
	if fresh {
		if err := o.prepare(ctx); err != nil {
			return errors.Join(err, luks.Close(context.WithoutCancel(ctx), o.closeRequest(m)), o.forget(o.v.ID))
		}
	}
	o.on(o.e, EventMapped, nil)
	return o.mount(ctx)
}

// prepare makes what a throw-away mapping is for.
func (o *opening) prepare(ctx context.Context) error {
	defer o.announce()
	if o.v.Kind == node.Swap {
		if err := filesystem.MakeSwap(ctx, o.mapping.Path); err != nil {
			return err
		}
		return swapOn(o.mapping.Path)
	}
	if o.v.Filesystem == "none" {
		return nil
	}
	return filesystem.Make(ctx, o.mapping.Path, o.v.Filesystem, filesystem.Options{Label: o.v.Label})
}
