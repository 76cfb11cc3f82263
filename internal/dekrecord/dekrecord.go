// Package dekrecord is the body of an object of kms/dek: what is kept of one volume's
// wrapped key. docs/spec/volume-record.md specifies it.
package dekrecord

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/kms"
)

// Record is the body of an object.
type Record struct {
	ID      string      `json:"id"`
	Version uint32      `json:"version"`
	Length  int         `json:"length"`
	Wrapped kms.Wrapped `json:"wrapped"`
}

// New returns the body for a wrapped key.
func New(b kms.Binding, w kms.Wrapped) ([]byte, error) {
	return json.Marshal(&Record{b.VolumeID, b.Version, b.Length, w})
}

// Binding returns what the wrapped key was made for.
func (r *Record) Binding() kms.Binding {
	return kms.Binding{VolumeID: r.ID, Purpose: kms.VolumeDEK, Version: r.Version, Length: r.Length}
}

// Parse parses a body that the MAC vouches for, strictly: it must be what encoding the
// result gives again. Errors wrap [macstore.ErrRefused].
func Parse(id string, body []byte) (*Record, error) {
	r := &Record{}
	if err := json.Unmarshal(body, r); err != nil {
		return nil, fmt.Errorf("%w: %w", macstore.ErrRefused, err)
	}
	again, err := json.Marshal(r)
	switch {
	case err != nil || !bytes.Equal(again, body):
		return nil, fmt.Errorf("%w: not in canonical form", macstore.ErrRefused)
	case r.ID != id:
		return nil, fmt.Errorf("%w: it is of volume %q", macstore.ErrRefused, r.ID)
	}
	if err := r.Binding().Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", macstore.ErrRefused, err)
	}
	return r, nil
}

// Visit is the [macstore.Visit] of these records.
func Visit(id string, body []byte, f func(kms.Binding, kms.Wrapped) (kms.Wrapped, error)) ([]byte, error) {
	r, err := Parse(id, body)
	if err != nil {
		return nil, err
	}
	if r.Wrapped, err = f(r.Binding(), r.Wrapped); err != nil {
		return nil, err
	}
	return json.Marshal(r)
}
