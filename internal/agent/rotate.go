package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/luks"
)

// Rotator carries the change of a volume's key, see docs/spec/volume-record.md.
type Rotator interface {
	Rotate(ctx context.Context, k *keyclient.Key, step keyclient.RotationStep, m keyclient.MACs) error
}

// Rotate gives an open volume another key, or finishes a change that was cut off. The data
// stay as they are, and reads and writes go on meanwhile.
func (c *Volumes) Rotate(ctx context.Context, id string) (Volume, error) {
	return c.with(ctx, id, c.rotate)
}

func (c *Volumes) rotate(ctx context.Context, e *entry) error {
	c.mu.Lock()
	state, l := e.condition.state, e.lease
	c.mu.Unlock()
	switch {
	case e.spec.Throwaway():
		return errThrowaway
	case state != Open && state != Mounted:
		return failure.Newf(failure.State, "open it first", "the volume is %s", state)
	case e.spec.Measure:
		return failure.Newf(failure.State, "a policy that names what is measured would refuse this machine at its next start",
			"the key of a volume that is measured is not changed: what is measured is derived from it")
	case e.spec.ReadOnly:
		return failure.Newf(failure.State, "the node that writes it does that", "the volume is open read-only here")
	case l != nil && l.lost:
		return failure.Newf(failure.Held, "close it here", "another node has the volume")
	}
	defer c.Keys.Hold()()
	ask := keyclient.Request{Volume: e.spec.ID, Rotate: true}
	if known, ok := c.recall(e.spec.ID); ok {
		ask.LeaseID = known.LeaseID
	}
	if l != nil {
		ask.LeaseID = l.id
	}
	next, err := c.Keys.GetKey(ctx, ask)
	if f := failure.Of(err); f.Class == failure.Usage { // it does not know what is asked for
		err = failure.WithID(failure.New(f.Class, err, "upgrade the key service: one of before changes no keys"), f.CorrelationID)
	}
	if err != nil {
		return err
	}
	defer next.Close()
	if err := c.sameLease(ctx, e, next); err != nil {
		return failure.WithID(err, next.CorrelationID)
	}
	c.set(func() { e.lastID = next.CorrelationID })
	if next.Lease == nil {
		return failure.Newf(failure.State, "", "the key service gave no lease with the next key")
	}
	c.hold(e, next.Lease)
	r := &rotation{Volumes: c, e: e, next: next}
	return failure.WithID(classify(c.step(ctx, "rotated", func() error { return r.run(ctx) })), next.CorrelationID)
}

// rotation is one run of Rotate.
type rotation struct {
	*Volumes
	e    *entry
	next *keyclient.Key // that the volume is to have
}

// until is when this node may write nothing any more: another one may have the volume.
func (r *rotation) until() luks.Deadline {
	return luks.DeadlineIn(r.next.Lease.Until - keyclient.Boottime())
}

func (r *rotation) run(ctx context.Context) error {
	device := r.e.spec.DevicePath()
	h, err := r.standing(ctx)
	if err == nil && h == nil {
		h, err = r.prepare(ctx)
	}
	if err != nil {
		return err
	}
	macs := keyMACs(h.MACs())
	if err := r.Keys.Rotate(ctx, r.next, keyclient.RotationStands, macs); err != nil {
		return err
	}
	// From here on it is the next header that this node looks after, also after a restart.
	if err := r.succeed(h); err != nil {
		return err
	}
	// Also if it looks as if it were in front: what the cache shows may never have reached the
	// disk.
	if err := luks.PutNext(ctx, device, h, r.until()); err != nil {
		return err
	}
	if err := r.Keys.Rotate(ctx, r.next, keyclient.RotationDone, macs); err != nil {
		return err
	}
	r.set(func() {
		r.e.keptNext = 0 // what is kept for an outage opens nothing any more
		r.e.known.Changing = false
	})
	if err := r.rememberKnown(r.e); err != nil {
		r.Log.Warn("could not keep the state of a volume", "volume", r.e.spec.ID, "error", err)
	}
	r.Log.Info("the volume has another key", "volume", r.e.spec.ID, "key_version", r.next.KeyVersion, "correlation_id", r.next.CorrelationID,
		"hint", "make a new backup of its header: an older one opens nothing")
	if err := luks.ForgetNext(ctx, device, r.until()); err != nil { // it is a copy of the one in front now
		r.Log.Warn("could not remove what the change of a key left", "volume", r.e.spec.ID, "error", err)
		return nil
	}
	r.set(func() { r.e.tidy = true })
	return nil
}

// standing returns the next header if this node or an earlier one has made it and it is whole
// on the disk. Then it is kept there, too.
func (r *rotation) standing(ctx context.Context) (*luks.Header, error) {
	if r.next.MACs == (keyclient.MACs{}) {
		return nil, nil
	}
	req := luks.HeaderRequest{Device: r.e.spec.DevicePath(), Identity: identity(r.next), MACs: luksMACs(r.next.MACs)}
	h, err := luks.NextHeader(ctx, req, r.next.DEK)
	if otherHeader(err) {
		h, err = luks.ReadHeader(ctx, req, r.next.DEK)
	}
	if own := r.e.header; otherHeader(err) && own != nil && own.MACs() == req.MACs {
		h, err = own, nil // this process made it, and the disk has lost it
	}
	switch {
	case otherHeader(err):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return h, luks.KeepNext(ctx, req.Device, h, r.until()) // both copies, should one be damaged
}

// prepare makes the next header, and puts it beside the present one once the record names it.
func (r *rotation) prepare(ctx context.Context) (*luks.Header, error) {
	key, err := r.Keys.GetKey(ctx, keyclient.Request{Volume: r.e.spec.ID, LeaseID: r.next.Lease.ID})
	if err != nil {
		return nil, err
	}
	defer key.Close()
	device, id := r.e.spec.DevicePath(), identity(key)
	front := r.e.header
	if front == nil || front.MACs() != luksMACs(key.MACs) {
		if front, err = luks.ReadHeader(ctx, luks.HeaderRequest{Device: device, Identity: id, MACs: luksMACs(key.MACs)}, key.DEK); err != nil {
			return nil, err
		}
	}
	h, err := luks.NewNextHeader(ctx, front, id, key.DEK, r.next.DEK)
	if err != nil {
		return nil, err
	}
	if err := r.Keys.Rotate(ctx, r.next, keyclient.RotationBegins, keyMACs(h.MACs())); err != nil {
		return nil, err
	}
	return h, luks.KeepNext(ctx, device, h, r.until())
}

// succeed makes the next header the one that is watched, put back and shown. An agent that
// is started anew must not put the one before back, which nothing opens soon.
func (r *rotation) succeed(h *luks.Header) error {
	if err := r.writeHeader(r.e.spec.ID, h); err != nil {
		return err
	}
	r.set(func() {
		r.e.header = h
		r.e.known.MACs, r.e.known.KeyVersion, r.e.known.Changing = keyMACs(h.MACs()), r.next.KeyVersion, true
	})
	return r.rememberKnown(r.e)
}

// otherHeader says that the header that was read is not the one of a key, or is none.
func otherHeader(err error) bool {
	return errors.Is(err, luks.ErrHeaderMAC) || errors.Is(err, luks.ErrHeaderRefused)
}

// either runs f with the key of a volume, and if its header is not that key's, with the one
// that the volume is to have, if its key is being changed. That header may not be in front
// yet: then f gets the one that is kept. If f succeeds so, key is that other key from then on.
func (c *Volumes) either(ctx context.Context, device string, key *keyclient.Key, readOnly bool, f func(kept *luks.Header) error) error {
	err := f(nil)
	if !otherHeader(err) || key.State != keyclient.Active {
		return err
	}
	at := luks.HeaderRequest{Device: device, Identity: identity(key), MACs: luksMACs(key.MACs)}
	if kept, keptErr := luks.NextHeader(ctx, at, key.DEK); keptErr == nil {
		return f(kept) // the change came to its end, and the header in front did not reach the disk
	}
	req := keyclient.Request{Volume: key.Volume, ReadOnly: readOnly, Next: true}
	if key.Lease != nil {
		req.LeaseID = key.Lease.ID
	}
	next, nextErr := c.Keys.GetKey(ctx, req)
	if class := failure.Of(nextErr).Class; class == failure.State {
		// It is not being changed. Or it was until now: then the present key is another one.
		req.Next = false
		next, nextErr = c.Keys.GetKey(ctx, req)
		if nextErr == nil && next.KeyVersion == key.KeyVersion {
			return errors.Join(err, next.Close())
		}
	} else if class == failure.Usage || class == failure.NotFound {
		return err // a key service of before
	}
	if nextErr != nil { // whether it is being changed cannot be known now
		f := failure.Of(nextErr)
		return failure.WithID(failure.New(f.Class, errors.Join(nextErr, err), f.Hint), f.CorrelationID)
	}
	if next.MACs == (keyclient.MACs{}) {
		return errors.Join(err, next.Close())
	}
	before := *key
	*key = *next
	if nextErr = f(nil); otherHeader(nextErr) {
		at.MACs = luksMACs(key.MACs)
		kept, keptErr := luks.NextHeader(ctx, at, key.DEK)
		switch {
		case keptErr == nil:
			nextErr = f(kept)
		case otherHeader(keptErr):
			nextErr = err // of the present key: neither is there
		default:
			nextErr = keptErr
		}
	}
	if nextErr != nil {
		*key = before
		return errors.Join(nextErr, next.Close())
	}
	c.Log.Warn("the volume's key is being changed: its header is the next one", "volume", key.Volume, "key_version", key.KeyVersion)
	if key.Lease != nil {
		key.Lease.Rotate = true
	}
	return before.Close()
}

// rotateWithin bounds a change that nobody on this node waits for: the volume has to wait for
// it when it is to be closed.
const rotateWithin = 30 * time.Second

// rotateSoon does what the key service asked for with a renewal, unless that is under way, or
// removes what is left of an earlier change. What fails is tried again after the next renewal.
func (c *Volumes) rotateSoon(ctx context.Context, id string, e *entry) {
	busy := true
	c.set(func() { busy, e.rotating = e.rotating, true })
	if busy {
		return
	}
	defer c.set(func() { e.rotating = false })
	ctx, cancel := context.WithTimeout(ctx, rotateWithin)
	defer cancel()
	_, err := c.with(ctx, id, func(ctx context.Context, e *entry) error {
		c.mu.Lock()
		l, state := e.lease, e.condition.state
		c.mu.Unlock()
		if l == nil || l.lost || state != Open && state != Mounted {
			return nil
		}
		// Since the renewal somebody else may have done it.
		got, err := c.Keys.Renew(ctx, id, l.id)
		switch {
		case err != nil || got == nil:
			return err
		case got.Rotate:
			return c.rotate(ctx, e)
		}
		until := luks.DeadlineIn(got.Until - keyclient.Boottime())
		if err := luks.ForgetNext(ctx, e.spec.DevicePath(), until); err != nil {
			return err
		}
		c.set(func() { e.tidy = true })
		return nil
	})
	if err != nil && ctx.Err() != context.Canceled {
		c.warn(e, "rotation", fmt.Sprintf("its key is to be changed, and could not be: %v", err))
		c.Log.Error("could not change the key of a volume", "volume", id, "error", err)
		return
	}
	c.warn(e, "rotation", "")
}
