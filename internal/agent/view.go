package agent

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/mount"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/luks"
)

// Volume is a volume as people and programs are shown it.
type Volume struct {
	ID            string
	Device        string
	Mapped        string // /dev/mapper path, empty when closed
	Mount         string // canonical, empty when not mounted
	State         State
	UUID          string
	Generation    uint64
	KeyVersion    uint32
	LastError     string
	CorrelationID string
	Optional      bool
	Bytes         int64 // of plaintext, 0 when closed
	ReadOnly      bool
	Lease         string // none, held, bound or lost
	Warnings      []string
	Dynamic       bool
	OnRequest     bool
	Integrity     string // one of [node.Integrities], or empty
	Progress      string // of a long step that is under way, for people
	Created       bool   // by the call that returned it
}

// Status returns one volume.
func (c *Volumes) Status(ctx context.Context, id string) (Volume, error) {
	e := c.find(id)
	if e == nil || e.spec.ID == "" {
		return Volume{ID: id}, node.UnknownVolume(id)
	}
	c.look(ctx, id, e)
	return c.view(e), nil
}

// List returns the volumes whose IDs follow after, at most limit of them.
func (c *Volumes) List(ctx context.Context, after string, limit int) (page []Volume, more bool) {
	for _, id := range c.ids() {
		if id <= after {
			continue
		}
		if len(page) == limit {
			return page, true
		}
		e := c.find(id)
		c.look(ctx, id, e)
		page = append(page, c.view(e))
	}
	return page, false
}

// look compares what is known with what the kernel has. It does not wait for a
// volume that somebody works on.
func (c *Volumes) look(ctx context.Context, id string, e *entry) {
	select {
	case e.turn <- struct{}{}:
		defer func() { <-e.turn }()
	default:
		return
	}
	c.reconcile(ctx, id, e)
}

// reconcile brings the entry up to date: another process may have opened or closed
// the volume. The turn is held.
func (c *Volumes) reconcile(ctx context.Context, id string, e *entry) {
	up := e.condition.state == Open || e.condition.state == Mounted || e.condition.state == Suspended
	if r, ok := c.recall(id); ok && !up {
		c.found(ctx, e, r)
		return
	}
	if !up {
		return
	}
	m, err := c.status(ctx, e)
	switch {
	case errors.Is(err, luks.ErrNotActive):
		if err := c.closeBelow(ctx, e.spec.Name, e.known.UUID); err != nil {
			c.set(func() { e.lastErr = classify(err) })
			return
		}
		c.on(e, EventGone, nil)
		c.drop(ctx, e)
		c.set(func() { e.header = nil })
	case err != nil:
		c.set(func() { e.lastErr = classify(err) })
	case !m.Suspended && e.condition.state == Suspended:
		c.on(e, EventResume, nil)
	case m.Suspended && e.condition.state != Suspended:
		c.on(e, EventSuspend, nil)
	}
	if err == nil && e.known.lost() {
		c.warn(e, "disk", lostText)
	}
}

// found takes up a volume that another process, or this one before it was restarted,
// has left open.
func (c *Volumes) found(ctx context.Context, e *entry, r remembered) {
	m, err := luks.Status(ctx, r.Spec.Name)
	if err == nil && r.Sequence == 0 && m.Integrity != "" && m.UUID == r.UUID && m.DataDevice == r.Device {
		// Its first format was cut off. What its journal holds may still be written, so
		// that the lease goes on, or ends with a cut.
		c.set(func() {
			if e.known = r; e.spec.ID == "" || e.dynamic {
				e.spec, e.dynamic = r.Spec, r.Dynamic
			}
		})
		c.resumeLease(e, r)
		return
	}
	if err != nil || m.UUID != r.UUID || m.Throwaway != r.Spec.Throwaway() || m.DataDevice != r.Device || r.Sequence == 0 || r.Sequence != sequence(m.Device) {
		return // not ours, or not surely: Open proves it
	}
	h := c.keptHeader(r)
	c.set(func() {
		if e.spec.ID == "" || e.dynamic {
			e.spec, e.dynamic = r.Spec, r.Dynamic
		}
		if e.known = r; e.header == nil {
			e.header = h
		}
	})
	if e.condition.state == Absent || e.condition.state == Failed {
		c.on(e, EventOpen, nil)
	}
	c.mapped(e, m)
	switch {
	case m.Suspended:
		c.on(e, EventSuspend, nil)
	case r.Failed != "":
		err := errors.New(r.Failed)
		c.set(func() { e.lastErr = err })
		c.on(e, EventFail, err)
	}
	c.resumeLease(e, r)
	c.reserve(ctx, e)
}

// mapped takes an entry that is being opened to where its mapping is.
func (c *Volumes) mapped(e *entry, m luks.Mapping) {
	c.mu.Lock()
	at, kind := e.known.Mount, e.known.Spec.Kind
	c.mu.Unlock()
	c.on(e, EventMapped, nil)
	if on, err := mount.At(at); at != "" && err == nil && on != nil && on.Is(sourceOf(m).Device) || kind == node.Swap {
		c.on(e, EventMounted, nil)
	}
}

// suspended is mapped for a mapping that is, unless somebody let it go on.
func (c *Volumes) suspended(e *entry, m luks.Mapping) {
	if c.mapped(e, m); m.Suspended {
		c.on(e, EventSuspend, nil)
	}
}

// Recover takes up what an earlier agent of this boot left open.
func (c *Volumes) Recover(ctx context.Context) {
	for _, id := range c.remembers() {
		if _, ok := c.recall(id); !ok {
			continue
		}
		e := c.entryOf(id)
		give, err := c.take(ctx, id, e)
		if err != nil {
			return
		}
		// Again: another process may have been about to open it.
		if r, ok := c.recall(id); ok {
			c.found(ctx, e, r)
		}
		give()
	}
}

// view is the entry as it is shown.
func (c *Volumes) view(e *entry) Volume {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := Volume{
		ID: e.spec.ID, Device: e.spec.DevicePath(), State: e.condition.state, Optional: e.spec.Optional, OnRequest: e.spec.OnRequest, Dynamic: e.dynamic,
		Progress: e.progress, CorrelationID: e.lastID, Lease: e.leaseText(), Created: e.created,
		Warnings: slices.Sorted(maps.Values(e.warnings)),
	}
	if e.lastErr != nil {
		v.LastError = e.lastErr.Error()
		if id := failure.Of(e.lastErr).CorrelationID; id != "" {
			v.CorrelationID = id
		}
	}
	if e.known.Spec.ID == "" || v.State == Absent {
		return v
	}
	v.UUID, v.Generation, v.KeyVersion = e.known.UUID, e.known.Generation, e.known.KeyVersion
	m, err := luks.Status(context.Background(), e.spec.Name)
	if err != nil || m.UUID != e.known.UUID {
		return v
	}
	v.Mapped, v.Bytes, v.ReadOnly, v.Integrity = m.Path, m.Bytes, m.ReadOnly, string(m.Integrity)
	if on, err := mount.At(e.known.Mount); e.known.Mount != "" && err == nil && on != nil && on.Is(sourceOf(m).Device) {
		v.Mount = e.known.Mount
	}
	return v
}

// LastError is how the last attempt to open a volume ended.
func (c *Volumes) LastError(id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.entries[id]; ok {
		return e.lastErr
	}
	return node.UnknownVolume(id)
}
