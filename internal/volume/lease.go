package volume

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation/policy"
)

// leaseSize is the size of a lease's ID in bytes.
const leaseSize = 16

var (
	// ErrHeld means that somebody else creates or writes the volume.
	ErrHeld = errors.New("volume is held by somebody else")
	// ErrLease means that the caller's lease has ended, by an operator's word or
	// because somebody else has one.
	ErrLease = errors.New("lease has ended")
	// ErrOldNode means that a node is too old for what it asks: it knows no attempts
	// and no leases.
	ErrOldNode = errors.New("this node is older than the key service")
)

// HeldError refuses a caller because of somebody else, and says who. An attested
// caller that a grant covers may know: it decides whether to wait.
type HeldError struct {
	Volume string
	What   string // "is being created"
	Holder Holder
	Until  time.Time // zero: until it is given back, or an operator ends it
}

// Unwrap makes the error an ErrHeld.
func (e *HeldError) Unwrap() error { return ErrHeld }

func (e *HeldError) Error() string { return fmt.Sprintf("%s (%s)", e.PeerDetail(), e.Holder.Name) }

// PeerDetail is what the refused caller may see.
func (e *HeldError) PeerDetail() string {
	node := e.Holder.Node
	if node == "" {
		node = "another node"
	}
	until := "until it gives the volume back, or an operator ends its lease"
	if !e.Until.IsZero() {
		until = "until " + e.Until.UTC().Format(time.RFC3339) + ", or longer if it renews"
		if e.What == creating {
			until = "until " + e.Until.UTC().Format(time.RFC3339)
		}
	}
	return fmt.Sprintf("volume %q %s by %s %s", e.Volume, e.What, node, until)
}

const (
	creating = "is being created"
	written  = "is written"
)

// Terms is what a grant says of a volume's writers.
type Terms struct {
	Writers policy.Writers
	Expiry  bool // another node takes over when a lease has ended
	Term    time.Duration
}

// Proto is what the protocol calls it.
func (t Terms) Proto() keyservicev1.Writers {
	switch t.Writers {
	case policy.WritersMany:
		return keyservicev1.Writers_WRITERS_MANY
	case policy.WritersReaders:
		return keyservicev1.Writers_WRITERS_NONE
	}
	return keyservicev1.Writers_WRITERS_ONE
}

// bound reports whether a holder must stop writing by itself when it could not renew.
// Who cannot be told from other machines must: it could never take its own lease up
// again, and another one would wait for ever.
func (t Terms) bound(h Holder) bool { return t.Expiry || h.Machine == "" }

func (t Terms) lease(h Holder, id string, now time.Time) *Lease {
	now = now.UTC()
	return &Lease{ID: id, Holder: h, Since: now, Until: now.Add(t.Term), TermMS: t.Term.Milliseconds(), Bound: t.bound(h)}
}

// renewed is a lease that goes on. The answer to a renewal may be lost: until then its
// holder goes by what it was told before. So it never ends earlier than it did, and
// whether it is bound stays as it is, whatever the grant says since.
func (t Terms) renewed(l *Lease, h Holder, now time.Time) *Lease {
	next := t.lease(h, l.ID, now)
	next.Since, next.Bound = l.Since, l.Bound
	if l.Until.After(next.Until) {
		next.Until = l.Until
	}
	return next
}

// NewID returns an ID of a lease or an attempt, in hex.
func NewID() string {
	b := make([]byte, leaseSize)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// Take gives the caller what it needs to open the volume: the lease where one node
// writes, else nothing but the certainty that nobody else does. ends is when the lease
// in the record ends; id is that of a new one.
func (r *Record) Take(c *Caller, t Terms, id string, ends, now time.Time) error {
	old := r.Lease
	alien := old != nil && old.ID != id && !c.is(old.Holder, old.ID)
	if alien && (!old.Bound || ends.After(now)) {
		held := &HeldError{Volume: r.VolumeID, What: written, Holder: old.Holder}
		if old.Bound {
			held.Until = ends
		}
		return held
	}
	if t.Writers != policy.WritersOne && r.State.HoldsData() {
		r.Lease = nil // it ended, or is the caller's own from before the grant changed
		return nil
	}
	if c.Protocol < keyservicev1.Protocol && t.bound(c.Holder) {
		return fmt.Errorf("%w, and cannot renew a lease that ends by itself: upgrade it", ErrOldNode)
	}
	next := t.lease(c.Holder, id, now)
	if old != nil && c.Presents == old.ID {
		// The same process, or its successor over the same mapping. Where the machine
		// is the same and the ID is not known it was restarted, or is a copy: the new
		// ID ends what the old one may still do.
		next = t.renewed(old, c.Holder, now)
	}
	r.Lease = next
	if r.State == Formatted && (old == nil || next.ID != old.ID) {
		// The node that began must not confirm any more, also if it is a copy of the caller.
		r.Attempt = &Attempt{ID: id, Holder: c.Holder, Channel: c.Channel}
	}
	return nil
}

// Renew extends the caller's lease. A lease whose time is up can be renewed as long as
// nobody else took it.
func (r *Record) Renew(c *Caller, t Terms, now time.Time) error {
	l := r.Lease
	switch {
	case r.State == Retired:
		return fmt.Errorf("%w: %q", ErrRetired, r.VolumeID)
	case l == nil && t.Writers != policy.WritersOne && r.State.HoldsData():
		return nil
	case l == nil:
		return fmt.Errorf("%w: nobody holds volume %q", ErrLease, r.VolumeID)
	case c.Presents != l.ID:
		held := &HeldError{Volume: r.VolumeID, What: written, Holder: l.Holder}
		return fmt.Errorf("%w: %w", ErrLease, held)
	}
	r.Lease = t.renewed(l, c.Holder, now)
	return nil
}

// Release gives the caller's lease back. Giving back what one does not have is fine
// where nobody else has it.
func (r *Record) Release(c *Caller) error {
	switch {
	case r.Lease == nil:
		return nil
	case c.Presents != r.Lease.ID:
		return fmt.Errorf("%w: %w", ErrLease, &HeldError{Volume: r.VolumeID, What: written, Holder: r.Lease.Holder})
	}
	r.Lease = nil
	return nil
}
