package keyservice

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/record"
	"github.com/keyagent/keyagent/kms"
)

// State is where a volume is in its life. A volume without a record is absent.
type State string

// The states. Rotation adds one between active and active; a retired volume
// gives its key to nobody.
const (
	Pending State = "pending" // a key exists, the header is not confirmed
	Active  State = "active"  // the header is written: never format again
	Retired State = "retired"
)

// transitions is every change that a record may make.
var transitions = map[State][]State{
	"":      {Pending},
	Pending: {Active, Retired},
	Active:  {Retired},
}

// ErrRecord: a record is not one that this key service wrote under this name.
var ErrRecord = record.ErrRefused

// ErrTransition: a change that the life of a volume does not have.
var ErrTransition = errors.New("volume cannot change this way")

// Record is what the key service knows of one volume, and the only authority
// on whether it may be formatted. It is stored as JSON, with a MAC: see package
// record and docs/spec/volume-record.md.
type Record struct {
	VolumeID   string       `json:"volume_id"`
	State      State        `json:"state"`
	Revision   uint64       `json:"revision"`   // of the record; each change adds one
	Generation uint64       `json:"generation"` // of the header on the disk
	Owner      string       `json:"owner"`      // the grant under which it was made
	LUKSUUID   string       `json:"luks_uuid"`
	KeyVersion uint32       `json:"key_version"` // the one in use
	Keys       []WrappedDEK `json:"keys"`
	HeaderMAC  string       `json:"header_mac,omitempty"` // hex, once active
	Created    time.Time    `json:"created"`
	Updated    time.Time    `json:"updated"`
}

// WrappedDEK is one version of the volume's key.
type WrappedDEK struct {
	Version uint32      `json:"version"`
	Length  int         `json:"length"`
	Wrapped kms.Wrapped `json:"wrapped"`
}

// to moves the record to another state.
func (r *Record) to(next State, now time.Time) error {
	for _, s := range transitions[r.State] {
		if s == next {
			r.State, r.Updated = next, now.UTC()
			r.Revision++
			return nil
		}
	}
	return fmt.Errorf("%w: from %q to %q", ErrTransition, r.State, next)
}

// binding of the key in use.
func (r *Record) binding() (kms.Binding, kms.Wrapped, error) {
	for _, k := range r.Keys {
		if k.Version == r.KeyVersion {
			return kms.Binding{VolumeID: r.VolumeID, Purpose: kms.VolumeDEK, Version: k.Version, Length: k.Length}, k.Wrapped, nil
		}
	}
	return kms.Binding{}, kms.Wrapped{}, fmt.Errorf("%w: key version %d is not in it", ErrRecord, r.KeyVersion)
}

// parseRecord parses the JSON of a record strictly: it must be exactly what
// encoding the result gives again.
func parseRecord(body []byte) (*Record, error) {
	r := &Record{}
	if err := json.Unmarshal(body, r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	again, err := json.Marshal(r)
	if err != nil || !bytes.Equal(again, body) {
		return nil, fmt.Errorf("%w: not in canonical form", ErrRecord)
	}
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	return r, nil
}

func (r *Record) check() error {
	_, known := map[State]bool{Pending: true, Active: true, Retired: true}[r.State]
	mac, macErr := hex.DecodeString(r.HeaderMAC)
	switch {
	case !policy.ValidVolume(r.VolumeID):
		return errors.New("volume ID")
	case !known:
		return fmt.Errorf("state %q", r.State)
	case r.Revision == 0 || r.Generation == 0 || r.Owner == "" || len(r.LUKSUUID) != 36:
		return errors.New("a field is empty")
	case r.State == Active && (macErr != nil || len(mac) != sha256.Size):
		return errors.New("active without a header MAC")
	}
	b, _, err := r.binding()
	if err != nil {
		return err
	}
	return b.Validate()
}
