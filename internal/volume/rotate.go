package volume

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/keyagent/keyagent/internal/proof"
)

// A volume's key is changed by a header of the same volume key under another DEK, which
// stands whole on the disk before it takes the place of the present one. While that goes
// on the record has both keys, and the MACs of both headers: the disk has one of them.

// Rotation is the change of a volume's key that is under way.
type Rotation struct {
	KeyVersion uint32   `json:"key_version"`          // that the volume is to have
	HeaderMAC  string   `json:"header_mac,omitempty"` // of the next header, once a node has made one
	CopyMACs   []string `json:"copy_macs,omitempty"`
	// Stands says that this header is on the disk, whole. From now on it becomes the
	// volume's, whichever node finishes the change.
	Stands bool `json:"stands,omitempty"`
}

// Wish is an operator's word that a volume's key is to be changed.
type Wish struct {
	Due    time.Time `json:"due"`
	EveryS int64     `json:"every_s,omitempty"` // again so many seconds after each change; 0: once
}

// The bounds of how often a key is changed.
const (
	MinEvery = time.Hour
	MaxEvery = 100 * 365 * 24 * time.Hour
)

var (
	// ErrRotation means that what a caller says of a change of the key does not fit the
	// one that is under way.
	ErrRotation = errors.New("no such change of the volume's key is under way")
	// ErrRotating means that something has to wait until the volume's key is changed.
	ErrRotating = errors.New("the volume's key is being changed")
	// ErrNoRotation means that the key of a volume cannot be changed.
	ErrNoRotation = errors.New("this volume's key cannot be changed")
	// ErrOtherNext means that a node made another next header than the one that stands.
	ErrOtherNext = errors.New("the volume's next header stands already, and is another one")
)

func (r *Record) checkRotation() error {
	n := r.Rotation
	keys := 0
	for _, k := range r.Keys {
		if k.Version == n.KeyVersion {
			keys++
		}
	}
	switch {
	case n.KeyVersion <= r.KeyVersion || n.KeyVersion != r.LastVersion || keys != 1:
		return fmt.Errorf("to key version %d, from %d", n.KeyVersion, r.KeyVersion)
	case n.HeaderMAC != "":
		return checkMACs(n.HeaderMAC, n.CopyMACs, false)
	case n.Stands || len(n.CopyMACs) > 0:
		return errors.New("a header without a MAC")
	}
	return nil
}

func (r *Record) checkWish() error {
	if w := r.Rotate; w.Due.IsZero() || w.EveryS != 0 && (w.EveryS < int64(MinEvery/time.Second) || w.EveryS > int64(MaxEvery/time.Second)) {
		return errors.New("due never, or too often")
	}
	return nil
}

// Wants reports whether a node has something to do about the volume's key.
func (r *Record) Wants(now time.Time) bool {
	return r.State == Rotating || r.State == Active && r.Rotate != nil && !now.Before(r.Rotate.Due)
}

// Ask has the volume's key changed by the node that holds it, from now on, and again every
// so often. Zero is once.
func (r *Record) Ask(every time.Duration, now time.Time) error {
	if err := r.rotates(); err != nil {
		return err
	}
	if every != 0 && (every < MinEvery || every > MaxEvery) {
		return fmt.Errorf("%w: every %s", ErrRotation, every)
	}
	r.Rotate = &Wish{Due: now.UTC(), EveryS: int64(every / time.Second)}
	return nil
}

// rotates refuses a volume whose key cannot be changed.
func (r *Record) rotates() error {
	switch {
	case !r.State.HoldsData():
		return fmt.Errorf("%w: it is %s", ErrTransition, r.State)
	case len(r.CopyMACs) == 0:
		return fmt.Errorf("%w: it is of version 1, of which a disk's key and a key that opens no disk look alike", ErrNoRotation)
	case r.Diskless():
		return fmt.Errorf("%w: it is the data key itself, and has no disk", ErrNoRotation)
	}
	return nil
}

// Diskless reports whether the volume's key opens no disk. What stands in the place of a
// header's MACs is one value, which no disk has. Of records of version 1 it cannot be known.
func (r *Record) Diskless() bool {
	return len(r.CopyMACs) > 0 && !slices.ContainsFunc(r.CopyMACs, func(m string) bool { return m != r.HeaderMAC })
}

// holds demands that the caller has the volume's lease.
func (r *Record) holds(c *Caller) error {
	if r.Lease == nil || c.Presents != r.Lease.ID {
		return fmt.Errorf("%w: volume %q", ErrLease, r.VolumeID)
	}
	return nil
}

// BeginRotation gives the volume a key that it is to have, unless there is one. key is of
// the binding that [Record.NextKey] gives.
func (r *Record) BeginRotation(key WrappedDEK) error {
	if err := r.rotates(); err != nil {
		return err
	}
	if r.State == Rotating {
		return nil
	}
	if want := r.NextKey(); key.Version != want.Version || key.Length != want.Length {
		return fmt.Errorf("%w: key version %d was made meanwhile", ErrRotation, want.Version-1)
	}
	r.State, r.Keys, r.LastVersion = Rotating, append(slices.Clone(r.Keys), key), key.Version
	r.Rotation = &Rotation{KeyVersion: key.Version}
	return nil
}

// Next is the record as it will be with the key that the volume is to have.
func (r *Record) Next() (*Record, error) {
	if r.State != Rotating {
		return nil, fmt.Errorf("%w: it is %s", ErrRotation, r.State)
	}
	n := *r
	n.KeyVersion, n.HeaderMAC, n.CopyMACs = r.Rotation.KeyVersion, r.Rotation.HeaderMAC, r.Rotation.CopyMACs
	return &n, nil
}

// NextHeader names the header that the caller is about to put beside the present one. One
// that another caller named, and that does not stand, is replaced.
func (r *Record) NextHeader(c *Caller, h Header) error {
	n, err := r.rotation(c)
	if err != nil {
		return err
	}
	next, err := r.Next()
	if err == nil {
		err = next.fits(h)
	}
	if err != nil {
		return err
	}
	mac, copies := hex.EncodeToString(h.MAC), hexAll(h.CopyMACs)
	if n.Stands && mac != n.HeaderMAC {
		return ErrOtherNext
	}
	n.HeaderMAC, n.CopyMACs = mac, copies
	return nil
}

// NextStands says that the next header is on the disk. From here on the caller may put it
// in the place of the present one. Repeating it is fine.
func (r *Record) NextStands(c *Caller, mac []byte) error {
	n, err := r.rotation(c)
	if err != nil {
		return err
	}
	if len(mac) != proof.MACSize || n.HeaderMAC != hex.EncodeToString(mac) {
		return fmt.Errorf("%w: its next header is another one", ErrRotation)
	}
	n.Stands = true
	return nil
}

// Rotated says that the next header has taken the place of the present one, whose key is
// thereby destroyed. Repeating it is fine.
func (r *Record) Rotated(c *Caller, version uint32, mac []byte, now time.Time) error {
	text := hex.EncodeToString(mac)
	if r.State == Active && r.KeyVersion == version && r.HeaderMAC == text {
		return r.holds(c)
	}
	n, err := r.rotation(c)
	switch {
	case err != nil:
		return err
	case n.KeyVersion != version || n.HeaderMAC != text || len(mac) != proof.MACSize:
		return fmt.Errorf("%w: its next header is another one", ErrRotation)
	case !n.Stands:
		return fmt.Errorf("%w: nobody said that its next header stands", ErrRotation)
	}
	r.State, r.KeyVersion, r.HeaderMAC, r.CopyMACs = Active, n.KeyVersion, n.HeaderMAC, n.CopyMACs
	r.Rotation = nil
	r.Keys = slices.DeleteFunc(slices.Clone(r.Keys), func(k WrappedDEK) bool { return k.Version != version })
	switch w := r.Rotate; {
	case w == nil:
	case w.EveryS == 0:
		r.Rotate = nil
	default:
		r.Rotate = &Wish{Due: now.UTC().Add(time.Duration(w.EveryS) * time.Second), EveryS: w.EveryS}
	}
	return nil
}

// rotation is the change under way, of which the caller holds the volume.
func (r *Record) rotation(c *Caller) (*Rotation, error) {
	if r.State != Rotating {
		return nil, fmt.Errorf("%w: it is %s", ErrRotation, r.State)
	}
	if err := r.holds(c); err != nil {
		return nil, err
	}
	n := *r.Rotation
	r.Rotation = &n
	return r.Rotation, nil
}

// AbandonRotation is an operator's word: the volume keeps its key, and whatever wish there
// was is withdrawn. Once the next header stands, this takes force: the operator vouches that
// the present one is whole. Then nobody may hold the volume.
func (r *Record) AbandonRotation(force bool) error {
	r.Rotate = nil
	if r.State != Rotating {
		return nil
	}
	switch {
	case r.Rotation.Stands && !force:
		return fmt.Errorf("%w: its next header stands, and may have taken the place of the present one", ErrRotating)
	case r.Rotation.Stands && r.Lease != nil: // its holder would put the next header in front yet
		return fmt.Errorf("%w, by %s: close the volume there, or take it over", ErrRotating, r.Lease.Holder)
	}
	r.State = Active
	version := r.KeyVersion
	r.Keys = slices.DeleteFunc(slices.Clone(r.Keys), func(k WrappedDEK) bool { return k.Version != version })
	r.Rotation = nil
	return nil
}
