package volume

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/internal/proof"
)

// State is where a volume is in its life.
type State string

// The states.
const (
	Absent    State = ""          // there is no record
	Pending   State = "pending"   // a key exists; an attempt may be about to write a header
	Formatted State = "formatted" // the header stands, the file system may not
	Active    State = "active"    // it may hold data: never format again
	Rotating  State = "rotating"  // it is active, and its key is being changed
	Retired   State = "retired"   // its key is destroyed, and is released to nobody
)

// rule says whether a record of a state has a part.
type rule int

const (
	never rule = iota
	may
	must
)

// row is one state: where it stands in the order of a life, what the protocol calls
// it, which states come next, and what a record in it has.
type row struct {
	order                       int
	proto                       keyservicev1.VolumeState
	next                        []State
	key, header, attempt, lease rule
	rotation, wish              rule
}

// life is the whole life of a volume. A state that is not here does not exist, and a
// change that is not here does not happen.
var life = map[State]row{
	Absent: {order: 0, next: []State{Pending, Formatted, Active, Rotating, Retired}}, // all but the first by an import only
	Pending: {order: 1, proto: keyservicev1.VolumeState_VOLUME_STATE_PENDING, key: must, attempt: may,
		next: []State{Formatted, Retired}},
	Formatted: {order: 2, proto: keyservicev1.VolumeState_VOLUME_STATE_FORMATTED, key: must, header: must, attempt: must, lease: may,
		next: []State{Active, Pending, Retired}},
	Active: {order: 3, proto: keyservicev1.VolumeState_VOLUME_STATE_ACTIVE, key: must, header: must, lease: may, wish: may,
		next: []State{Rotating, Pending, Retired}},
	// For a node it is active: what it opens is a volume with data.
	Rotating: {order: 4, proto: keyservicev1.VolumeState_VOLUME_STATE_ACTIVE, key: must, header: must, lease: may, rotation: must, wish: may,
		next: []State{Active, Pending, Retired}},
	Retired: {order: 5, header: may, next: []State{Pending}},
}

// States returns the states that a record can have, in the order of a life.
func States() []State {
	var all []State
	for s := range life {
		if s != Absent {
			all = append(all, s)
		}
	}
	slices.SortFunc(all, func(a, b State) int { return life[a].order - life[b].order })
	return all
}

// Proto is what the protocol calls a state.
func (s State) Proto() keyservicev1.VolumeState { return life[s].proto }

// HoldsData reports whether a volume was given out for use: it is never formatted again.
func (s State) HoldsData() bool { return s == Active || s == Rotating }

// Before reports whether a state comes before another in a life.
func (s State) Before(t State) bool { return life[s].order < life[t].order }

// allows reports whether a record may go from a state to another.
func (s State) allows(next State) bool { return s == next || slices.Contains(life[s].next, next) }

var (
	// ErrTransition means that the life of a volume has no such change.
	ErrTransition = errors.New("volume cannot change this way")
	// ErrAttempt means that a node is not, or no longer, the one that creates the
	// volume.
	ErrAttempt = errors.New("this attempt does not have the volume")
	// ErrConfirm means that what a node says of its header does not fit the record.
	ErrConfirm = errors.New("confirmation does not fit the volume")
	// ErrNotActive means that the volume's first format did not finish.
	ErrNotActive = errors.New("volume is not active")
	// ErrRetired means that an operator ended the volume's life.
	ErrRetired = errors.New("volume is retired")
)

// AttemptTerm is how long a node may take to write a header.
const AttemptTerm = 2 * time.Minute

// Caller is who asks: what its evidence and its request say.
type Caller struct {
	Holder
	Channel  string // digest of the binder of its connection
	Presents string // ID, in hex, of an attempt or a lease that it held before; may be empty
	Protocol uint32
}

// is reports whether the caller is the one who has an attempt or a lease: the same
// machine, or who knows its ID.
func (c *Caller) is(h Holder, id string) bool {
	return (c.Machine != "" && c.Machine == h.Machine) || (c.Presents != "" && c.Presents == id)
}

// Header is what a node says of the header that it writes.
type Header struct {
	Generation uint64
	KeyVersion uint32
	MAC        []byte
	CopyMACs   [][]byte
}

// Free returns an error unless the caller may have the key of a volume that is being
// created: nobody else is about to write it.
func (r *Record) Free(c *Caller, now time.Time) error {
	a := r.Attempt
	if r.State != Pending || a == nil || c.is(a.Holder, a.ID) || !a.Until.After(now) {
		return nil
	}
	return &HeldError{Volume: r.VolumeID, What: creating, Holder: a.Holder, Until: *a.Until}
}

// Begin makes id the attempt that is about to write the header. It takes the place of
// the same caller's earlier one, and of one whose time is up.
func (r *Record) Begin(c *Caller, id []byte, h Header, now time.Time) error {
	if err := r.fits(h); err != nil {
		return err
	}
	if len(id) != proof.AttemptSize || proof.Zero(id) {
		return fmt.Errorf("%w: an ID of %d bytes, or of zeros", ErrAttempt, len(id))
	}
	if r.State != Pending {
		return fmt.Errorf("%w: it is %s, and has a header", ErrTransition, r.State)
	}
	as := *c
	as.Presents = hex.EncodeToString(id)
	if err := r.Free(&as, now); err != nil {
		return err
	}
	until := now.UTC().Add(AttemptTerm)
	next := &Attempt{ID: as.Presents, Holder: c.Holder, Channel: c.Channel,
		HeaderMAC: hex.EncodeToString(h.MAC), CopyMACs: hexAll(h.CopyMACs), Until: &until}
	// The same ID with another header would let one proof stand for two.
	if a := r.Attempt; a != nil && a.ID == next.ID && (a.HeaderMAC != next.HeaderMAC || !slices.Equal(a.CopyMACs, next.CopyMACs)) {
		return fmt.Errorf("%w: it began with another header", ErrAttempt)
	}
	r.Attempt = next
	return nil
}

func (r *Record) fits(h Header) error {
	if r.Generation != h.Generation || r.KeyVersion != h.KeyVersion {
		return fmt.Errorf("%w: generation %d and key version %d, the record has %d and %d", ErrConfirm,
			h.Generation, h.KeyVersion, r.Generation, r.KeyVersion)
	}
	if err := proof.CheckMACs(h.MAC, h.CopyMACs); err != nil {
		return fmt.Errorf("%w: %w", ErrConfirm, err)
	}
	return nil
}

// Stands makes the header of an attempt the volume's, and its node the holder of the
// lease. Only the attempt's own connection can say so. Its time may be up, as long as
// nobody took its place: nobody else has written then.
func (r *Record) Stands(c *Caller, id []byte, lease Terms, leaseID string, now time.Time) error {
	a := r.Attempt
	switch {
	case r.State != Pending && r.State != Formatted:
		return fmt.Errorf("%w: it is %s", ErrTransition, r.State)
	case a == nil || a.ID != hex.EncodeToString(id):
		return fmt.Errorf("%w: it was taken over, or never began", ErrAttempt)
	case a.Channel != c.Channel:
		return fmt.Errorf("%w: it began on another connection", ErrAttempt)
	case r.State == Formatted && r.Lease != nil:
		// The first answer may have been lost. The caller counts the term of this one
		// from now, so that the lease must last as long.
		r.Lease = lease.renewed(r.Lease, a.Holder, now)
		return nil
	case r.State == Formatted:
		return nil // it gave the lease back since
	}
	r.State, r.HeaderMAC, r.CopyMACs = Formatted, a.HeaderMAC, a.CopyMACs
	r.Attempt = &Attempt{ID: a.ID, Holder: a.Holder, Channel: a.Channel}
	r.Lease = lease.lease(a.Holder, leaseID, now)
	return nil
}

// Confirm makes a formatted volume active. Repeating it is fine.
func (r *Record) Confirm(id []byte, generation uint64, keyVersion uint32, mac []byte, keep bool) error {
	if len(mac) != proof.MACSize || proof.Zero(mac) {
		return fmt.Errorf("%w: header MAC of %d bytes, or of zeros", ErrConfirm, len(mac))
	}
	switch {
	case r.Generation != generation || r.KeyVersion != keyVersion:
		return fmt.Errorf("%w: generation %d and key version %d, the record has %d and %d", ErrConfirm,
			generation, keyVersion, r.Generation, r.KeyVersion)
	case r.HeaderMAC != hex.EncodeToString(mac) && (r.State.HoldsData() || r.State == Formatted):
		return fmt.Errorf("%w: it is %s with another header", ErrConfirm, r.State)
	case r.State.HoldsData():
		return nil
	case r.State != Formatted:
		return fmt.Errorf("%w: it is %s, and no attempt said that its header stands", ErrConfirm, r.State)
	case r.Attempt.ID != hex.EncodeToString(id):
		return fmt.Errorf("%w: it was taken over", ErrAttempt)
	}
	r.State, r.Attempt = Active, nil
	if !keep {
		r.Lease = nil
	}
	return nil
}
