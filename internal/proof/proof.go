// Package proof is how a node shows the key service, before and after it writes a
// volume's header, that it holds the DEK which this connection was given.
//
// A proof is a MAC under a key that is derived from the DEK. It covers the binder of
// the connection, so that it is worth nothing on another one, the step, so that one
// step's proof never stands for the other's, and the header that is meant. Both
// sides compute it with [Of]. docs/spec/volume-record.md specifies it.
package proof

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/keyagent/keyagent/internal/secret"
)

// The steps that a proof can be of.
const (
	Begin  = "begin"  // the header is about to be written
	Stands = "stands" // the header is on the disk

	// Of a change of the key, with the DEK that the volume is to have.
	RotateBegin  = "rotate begin"  // the next header is about to be written beside the present one
	RotateStands = "rotate stands" // it is on the disk
	RotateDone   = "rotate done"   // it took the present one's place
)

var steps = []string{Begin, Stands, RotateBegin, RotateStands, RotateDone}

// The sizes of an attempt and of a MAC in bytes, and the number of a header's copies.
const (
	AttemptSize = 16
	MACSize     = 32
	Copies      = 2
	binderSize  = 64
)

// domain of the derivation. A change of any encoding below changes its version.
const domain = "keyagent volume proof v1"

// ErrInput means that there is no proof of such a thing: a field is missing, or has
// another size than it must have.
var ErrInput = errors.New("cannot be proved")

// Input is what a proof is about.
type Input struct {
	Volume     string
	Generation uint64   // of the header, from 1
	Binder     []byte   // of the connection, see atls.Channel.Binder
	Step       string   // one of the above
	Attempt    []byte   // which attempt to create the volume, or which lease, 16 bytes
	HeaderMAC  []byte   // of the whole header, 32 bytes
	CopyMACs   [][]byte // of its two copies, 32 bytes each
}

// Of returns the proof.
func Of(dek *secret.Bytes, in Input) (mac [MACSize]byte, err error) {
	if err := in.check(); err != nil {
		return mac, err
	}
	info := string(binary.BigEndian.AppendUint64(lp([]byte(domain), []byte(in.Volume)), in.Generation))
	message := in.message()
	err = dek.Use(func(key []byte) (err error) {
		secret.Do(func() {
			var k []byte
			if k, err = hkdf.Key(sha256.New, key, nil, info, MACSize); err != nil {
				return
			}
			defer secret.Wipe(k)
			h := hmac.New(sha256.New, k)
			h.Write(message)
			h.Sum(mac[:0])
		})
		return err
	})
	return mac, err
}

// Verify reports whether got is the proof.
func Verify(dek *secret.Bytes, in Input, got []byte) (bool, error) {
	want, err := Of(dek, in)
	return err == nil && hmac.Equal(want[:], got), err
}

func (in *Input) message() []byte {
	m := lp(nil, in.Binder, in.Attempt, []byte(in.Step), in.HeaderMAC)
	return lp(m, in.CopyMACs...)
}

// lp appends each part behind its length as a 32-bit big-endian number.
func lp(to []byte, parts ...[]byte) []byte {
	for _, p := range parts {
		to = append(binary.BigEndian.AppendUint32(to, uint32(len(p))), p...)
	}
	return to
}

func (in *Input) check() error {
	switch {
	case in.Volume == "" || in.Generation == 0:
		return fmt.Errorf("%w: no volume, or no generation", ErrInput)
	case !slices.Contains(steps, in.Step):
		return fmt.Errorf("%w: there is no step %.16q", ErrInput, in.Step)
	case len(in.Binder) != binderSize || Zero(in.Binder):
		return fmt.Errorf("%w: binder of %d bytes", ErrInput, len(in.Binder))
	case len(in.Attempt) != AttemptSize || Zero(in.Attempt):
		return fmt.Errorf("%w: attempt of %d bytes", ErrInput, len(in.Attempt))
	}
	return CheckMACs(in.HeaderMAC, in.CopyMACs)
}

// CheckMACs demands the MAC of a header and those of its two copies. Zeros are no
// MAC: a field that nobody filled must not pass for one.
func CheckMACs(header []byte, copies [][]byte) error {
	if len(copies) != Copies {
		return fmt.Errorf("%w: %d copies of the header", ErrInput, len(copies))
	}
	for _, mac := range append([][]byte{header}, copies...) {
		if len(mac) != MACSize {
			return fmt.Errorf("%w: MAC of %d bytes", ErrInput, len(mac))
		}
		if Zero(mac) {
			return fmt.Errorf("%w: a MAC of zeros", ErrInput)
		}
	}
	return nil
}

// Zero reports whether b holds nothing but zeros.
func Zero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
