package volume

import (
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/keyagent/keyagent/kms"
)

// The events of this file are an operator's word, or a node's that has it from one.

// Retire ends the life of the volume. Its wrapped keys are gone from the record.
func (r *Record) Retire() error {
	if r.State == Retired {
		return nil
	}
	if !r.State.allows(Retired) || r.State == Absent {
		return fmt.Errorf("%w: from %q to %q", ErrTransition, r.State, Retired)
	}
	r.State, r.Keys, r.Attempt, r.Lease, r.Rotation, r.Rotate = Retired, []WrappedDEK{}, nil, nil, nil, nil
	return nil
}

// RetireBy is Retire by a node's word, if nobody else creates or writes the volume. ends is
// when the lease in the record ends.
func (r *Record) RetireBy(c *Caller, ends, now time.Time) error {
	if l := r.Lease; l != nil && !c.is(l.Holder, l.ID) && (!l.Bound || ends.After(now)) {
		held := &HeldError{Volume: r.VolumeID, What: written, Holder: l.Holder}
		if l.Bound {
			held.Until = ends
		}
		return held
	}
	if err := r.Free(c, now); err != nil {
		return err
	}
	return r.Retire()
}

// Reset begins a new life on another disk: a new generation, with a key of its own.
// What the old disk holds is lost with the old key.
func (r *Record) Reset(key WrappedDEK) error {
	if r.State == Absent {
		return fmt.Errorf("%w: there is no record", ErrTransition)
	}
	id, err := uuid.NewRandom()
	if err != nil {
		return err
	}
	r.State, r.Generation, r.LUKSUUID = Pending, r.Generation+1, id.String()
	r.KeyVersion, r.Keys = key.Version, []WrappedDEK{key}
	r.HeaderMAC, r.CopyMACs, r.Attempt, r.Lease, r.Rotation, r.Rotate = "", nil, nil, nil, nil, nil
	return nil
}

// NextKey is the binding of the key that [Record.Reset] and [Record.BeginRotation] take. It
// has a version that no key had before, of those that were never used as well, and the length
// of the one before, which a retired record does not know any more.
func (r *Record) NextKey() kms.Binding {
	length := DEKLength
	if b, _, err := r.Binding(); err == nil {
		length = b.Length
	}
	return kms.Binding{VolumeID: r.VolumeID, Purpose: kms.VolumeDEK, Version: max(r.KeyVersion, r.LastVersion) + 1, Length: length}
}

// End takes the volume from its holder, which learns of it when it renews.
// It reports whether there was one.
func (r *Record) End() (Holder, bool) {
	switch {
	case r.Lease != nil:
		h := r.Lease.Holder
		r.Lease = nil
		if r.Attempt != nil {
			r.Attempt.ID = NewID()
		}
		return h, true
	case r.State == Pending && r.Attempt != nil:
		h := r.Attempt.Holder
		r.Attempt = nil
		return h, true
	}
	return Holder{}, false
}
