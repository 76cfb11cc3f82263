// Package volume is what the key service knows of volumes: a record for each, the
// table of its life, and the leases of those who write.
//
// A [Record] is changed by the events in life.go, lease.go and operator.go, which
// decide and touch no storage. A [Store] keeps records: every change is one
// compare-and-swap, in [Store.Update]. docs/spec/volume-record.md specifies both.
package volume

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/proof"
	"github.com/keyagent/keyagent/kms"
)

// ErrRecord means that an object is not a record that a key service wrote under this
// name.
var ErrRecord = macstore.ErrRefused

// Record is what the key service knows of one volume, and the only authority on
// whether it may be formatted. It is stored as JSON, with a MAC: see package macstore.
type Record struct {
	VolumeID   string       `json:"volume_id"`
	State      State        `json:"state"`
	Revision   uint64       `json:"revision"`   // of the record; each change adds one
	Generation uint64       `json:"generation"` // of the header on the disk
	Owner      string       `json:"owner"`      // the grant under which it was made
	LUKSUUID   string       `json:"luks_uuid"`
	KeyVersion uint32       `json:"key_version"` // the one in use
	Keys       []WrappedDEK `json:"keys"`
	HeaderMAC  string       `json:"header_mac,omitempty"` // hex, once the header stands
	CopyMACs   []string     `json:"copy_macs,omitempty"`  // of its copies; none for headers of version 1
	Attempt    *Attempt     `json:"attempt,omitempty"`    // to create the volume
	Lease      *Lease       `json:"lease,omitempty"`      // of who writes it
	// LastVersion is the highest version of a key that was ever made for a change of it. 0:
	// none was.
	LastVersion uint32    `json:"last_version,omitempty"`
	Rotation    *Rotation `json:"rotation,omitempty"` // of the key, under way
	Rotate      *Wish     `json:"rotate,omitempty"`   // of an operator
	Created     time.Time `json:"created"`
	Updated     time.Time `json:"updated"`
}

// WrappedDEK is one version of the volume's key.
type WrappedDEK struct {
	Version uint32      `json:"version"`
	Length  int         `json:"length"`
	Salt    string      `json:"salt,omitempty"` // hex, of its derivation
	Wrapped kms.Wrapped `json:"wrapped"`
}

// Holder is who has an attempt or a lease.
type Holder struct {
	Machine string `json:"machine,omitempty"` // what tells it from other machines, if anything does
	Name    string `json:"holder"`            // the identities of its evidence
	Node    string `json:"node,omitempty"`    // what people call it, by its own word
}

func (h Holder) String() string {
	s := h.Node
	for _, more := range []string{h.Machine, h.Name} {
		if more != "" && s != "" {
			s += " "
		}
		s += more
	}
	return s
}

// Attempt is a node on its way to a volume's first header.
type Attempt struct {
	ID string `json:"id"` // hex
	Holder
	Channel   string     `json:"channel"` // digest of the binder of its connection
	HeaderMAC string     `json:"header_mac,omitempty"`
	CopyMACs  []string   `json:"copy_macs,omitempty"`
	Until     *time.Time `json:"until,omitempty"` // nil once the header stands
}

// Lease is the right to write a volume.
type Lease struct {
	ID string `json:"id"` // hex
	Holder
	Since  time.Time `json:"since"`
	Until  time.Time `json:"until"`   // as far as the record knows
	TermMS int64     `json:"term_ms"` // of each renewal
	Bound  bool      `json:"bound,omitempty"`
}

// Term is how long a renewal lasts.
func (l *Lease) Term() time.Duration { return time.Duration(l.TermMS) * time.Millisecond }

// Binding is the binding and the wrapped form of the key in use.
func (r *Record) Binding() (kms.Binding, kms.Wrapped, error) {
	for _, k := range r.Keys {
		if k.Version == r.KeyVersion {
			return r.bindingOf(k), k.Wrapped, nil
		}
	}
	return kms.Binding{}, kms.Wrapped{}, fmt.Errorf("%w: key version %d is not in it", ErrRecord, r.KeyVersion)
}

// CheckLength returns an error unless the key in use has the length that a caller asks
// for. 0 asks for none.
func (r *Record) CheckLength(length int) error {
	b, _, err := r.Binding()
	if err == nil && length != 0 && length != b.Length {
		err = fmt.Errorf("%w: that of volume %q has %d bytes, asked for are %d", ErrLength, r.VolumeID, b.Length, length)
	}
	return err
}

func (r *Record) bindingOf(k WrappedDEK) kms.Binding {
	return kms.Binding{VolumeID: r.VolumeID, Purpose: kms.VolumeDEK, Version: k.Version, Length: k.Length, Salt: k.Salt}
}

// Encode gives the body of a record.
func (r *Record) Encode() ([]byte, error) { return json.Marshal(r) }

// Parse parses the body of the record of a volume strictly: it must be exactly what
// encoding the result gives again.
func Parse(id string, body []byte) (*Record, error) {
	r := &Record{}
	if err := json.Unmarshal(body, r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	again, err := r.Encode()
	if err != nil || !bytes.Equal(again, body) {
		return nil, fmt.Errorf("%w: not in canonical form", ErrRecord)
	}
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	if r.VolumeID != id {
		return nil, fmt.Errorf("%w: it is of volume %q, not %q", ErrRecord, r.VolumeID, id)
	}
	return r, nil
}

func (r *Record) check() error {
	row, known := life[r.State]
	switch {
	case !policy.ValidVolume(r.VolumeID):
		return errors.New("volume ID")
	case !known || r.State == Absent:
		return fmt.Errorf("state %q", r.State)
	case r.Revision == 0 || r.Generation == 0 || r.Owner == "" || len(r.LUKSUUID) != 36:
		return errors.New("a field is empty")
	}
	for _, part := range []struct {
		name  string
		rule  rule
		there bool
		check func() error
	}{
		{"key", row.key, len(r.Keys) > 0, r.checkKeys},
		{"header MAC", row.header, r.HeaderMAC != "" || len(r.CopyMACs) > 0, func() error { return checkMACs(r.HeaderMAC, r.CopyMACs, true) }},
		{"attempt", row.attempt, r.Attempt != nil, r.checkAttempt},
		{"lease", row.lease, r.Lease != nil, r.checkLease},
		{"rotation", row.rotation, r.Rotation != nil, r.checkRotation},
		{"wish", row.wish, r.Rotate != nil, r.checkWish},
	} {
		switch {
		case part.there && part.rule == never:
			return fmt.Errorf("%s with a %s", r.State, part.name)
		case !part.there && part.rule == must:
			return fmt.Errorf("%s without a %s", r.State, part.name)
		case !part.there:
			continue
		}
		if err := part.check(); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return nil
}

func (r *Record) checkKeys() error {
	b, _, err := r.Binding()
	if err != nil {
		return err
	}
	return b.Validate()
}

func (r *Record) checkAttempt() error {
	a := r.Attempt
	writes := r.State == Pending // what it has not written yet, the record does not have
	switch {
	case !isHex(a.ID, proof.AttemptSize) || !isHex(a.Channel, 32):
		return errors.New("no ID, or no channel")
	case writes != (a.Until != nil) || writes != (a.HeaderMAC != ""):
		return errors.New("it is not of this state")
	case writes:
		return checkMACs(a.HeaderMAC, a.CopyMACs, false)
	case len(a.CopyMACs) > 0:
		return errors.New("it is not of this state")
	}
	return nil
}

func (r *Record) checkLease() error {
	l := r.Lease
	if !isHex(l.ID, leaseSize) || l.TermMS <= 0 || l.Until.Before(l.Since) {
		return errors.New("no ID, or no term")
	}
	return nil
}

// checkMACs demands those of a header. A header of version 1 has none of its copies.
func checkMACs(header string, copies []string, v1 bool) error {
	mac, err := hex.DecodeString(header)
	if err != nil {
		return errors.New("not hex")
	}
	if v1 && len(copies) == 0 {
		if len(mac) != proof.MACSize {
			return fmt.Errorf("%d bytes", len(mac))
		}
		return nil // also zeros: a record of an older key service keeps what it has
	}
	all, err := unhex(copies)
	if err != nil {
		return err
	}
	return proof.CheckMACs(mac, all)
}

func isHex(s string, size int) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == size && hex.EncodeToString(b) == s
}

func unhex(all []string) ([][]byte, error) {
	out := make([][]byte, len(all))
	for i, s := range all {
		var err error
		if out[i], err = hex.DecodeString(s); err != nil {
			return nil, errors.New("not hex")
		}
	}
	return out, nil
}

func hexAll(all [][]byte) []string {
	var out []string
	for _, b := range all {
		out = append(out, hex.EncodeToString(b))
	}
	return out
}

// MACs returns those of the header, once it stands.
func (r *Record) MACs() (header []byte, copies [][]byte, err error) {
	if r.HeaderMAC == "" {
		return nil, nil, nil
	}
	header, err = hex.DecodeString(r.HeaderMAC)
	if err == nil {
		copies, err = unhex(r.CopyMACs)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	return header, copies, nil
}

// Meant returns the MACs of the header that is about to stand, or stands.
func (r *Record) Meant() (header []byte, copies [][]byte, err error) {
	if r.State == Pending && r.Attempt != nil {
		meant := Record{HeaderMAC: r.Attempt.HeaderMAC, CopyMACs: r.Attempt.CopyMACs}
		return meant.MACs()
	}
	return r.MACs()
}
