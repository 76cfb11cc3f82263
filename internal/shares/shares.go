// Package shares splits a master secret among operators, so that some of them together have
// it, and fewer have nothing.
//
// What is shared is a random scalar (Shamir, with Feldman's commitments, by circl, over
// ristretto255), under which the master secret lies sealed. By the commitments a wrong share is
// known before it is used. docs/spec/shares.md specifies the formats.
package shares

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"crypto/hkdf"

	"github.com/cloudflare/circl/group"
	"github.com/cloudflare/circl/secretsharing"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
)

// The bounds of a split, and of files in bytes.
const (
	MinThreshold = 2
	MaxShares    = 64
	MaxSealed    = 64 << 10
	MaxShare     = 1 << 10
)

var (
	// ErrFormat means that a file is not what it should be.
	ErrFormat = errors.New("malformed")
	// ErrSplit means that nothing can be split like that.
	ErrSplit = errors.New("a secret is split into 2 to 64 shares, of which at least 2 are needed")
	// ErrTooFew means that there are fewer shares than are needed.
	ErrTooFew = errors.New("not enough shares")
	// ErrForeign means that a share belongs to another split.
	ErrForeign = errors.New("share is of another split")
	// ErrRepeated means that a share was given before.
	ErrRepeated = errors.New("share was given twice")
	// ErrForged means that a share is not the one that was made.
	ErrForged = errors.New("share is not the one that was made")
)

const (
	version    = 1
	domainID   = "keyagent split v1"
	domainSeal = "keyagent sealed master secret v1"
	size       = 32 // of a scalar and an element in bytes
)

var field = group.Ristretto255

// Sealed is the master secret under what is shared. It is not secret.
type Sealed struct {
	Version     int      `json:"version"`
	Threshold   int      `json:"threshold"` // shares that are needed
	Shares      int      `json:"shares"`    // that there are
	Length      int      `json:"length"`    // of the master secret in bytes
	Commitments [][]byte `json:"commitments"`
	Box         []byte   `json:"box"`

	points []group.Element
}

// Share is what one operator has. Close wipes it.
type Share struct {
	Split string // the ID of the sealed secret
	Index int    // from 1
	value *secret.Bytes
}

// Close wipes the share.
func (s *Share) Close() error { return s.value.Close() }

// ID tells splits apart.
func (s *Sealed) ID() string {
	h := sha256.New()
	h.Write([]byte(domainID))
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(s.Threshold)))
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(s.Shares)))
	for _, c := range s.Commitments {
		h.Write(c)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

func (s *Sealed) binding() kms.Binding {
	return kms.Binding{VolumeID: "keyservice", Purpose: kms.MasterSecret, Version: 1, Length: s.Length}
}

// key derives what the master secret is sealed under.
func (s *Sealed) key(scalar []byte) (*secret.Bytes, error) {
	raw, err := hkdf.Key(sha256.New, scalar, []byte(s.ID()), domainSeal, 32)
	if err != nil {
		return nil, err
	}
	return secret.From(raw)
}

// Split seals a master secret of 16 to 64 bytes under a new scalar, of which threshold of n
// shares are needed. [ErrSplit].
func Split(master *secret.Bytes, threshold, n int) (s *Sealed, all []*Share, err error) {
	if threshold < MinThreshold || n < threshold || n > MaxShares {
		return nil, nil, fmt.Errorf("%w: %d of %d", ErrSplit, threshold, n)
	}
	s = &Sealed{Version: version, Threshold: threshold, Shares: n, Length: master.Len()}
	if err := s.binding().Validate(); err != nil {
		return nil, nil, err
	}
	secret.Do(func() { all, err = s.split(master) })
	if err != nil {
		return nil, nil, err
	}
	return s, all, nil
}

func (s *Sealed) split(master *secret.Bytes) (all []*Share, err error) {
	scalar := field.RandomNonZeroScalar(rand.Reader)
	sharing := secretsharing.New(rand.Reader, uint(s.Threshold-1), scalar)
	for _, c := range sharing.CommitSecret() {
		text, err := c.MarshalBinaryCompress()
		if err != nil {
			return nil, err
		}
		s.Commitments, s.points = append(s.Commitments, text), append(s.points, c)
	}
	if len(s.Commitments) != s.Threshold {
		return nil, errors.New("the polynomial is of a lower degree") // which happens once in 2^252 times
	}
	raw, err := scalar.MarshalBinary()
	if err != nil {
		return nil, err
	}
	key, err := s.key(raw)
	if err != nil {
		return nil, err
	}
	defer key.Close()
	if s.Box, err = backend.Seal(key, s.binding(), master); err != nil {
		return nil, err
	}
	id := s.ID()
	for i, share := range sharing.Share(uint(s.Shares)) {
		raw, err := share.Value.MarshalBinary()
		if err != nil {
			return nil, err
		}
		value, err := secret.From(raw)
		if err != nil {
			return nil, err
		}
		all = append(all, &Share{id, i + 1, value})
	}
	return all, nil
}

// Check tells a share that was made with this from another one: [ErrForeign], [ErrForged].
func (s *Sealed) Check(share *Share) error {
	if share.Split != s.ID() {
		return fmt.Errorf("share %d: %w", share.Index, ErrForeign)
	}
	if share.Index < 1 || share.Index > s.Shares {
		return fmt.Errorf("share %d of %d: %w", share.Index, s.Shares, ErrForged)
	}
	ok := false
	err := share.value.Use(func(raw []byte) error {
		secret.Do(func() {
			if value, err := scalarOf(raw); err == nil {
				ok = secretsharing.Verify(uint(s.Threshold-1), secretsharing.Share{ID: field.NewScalar().SetUint64(uint64(share.Index)), Value: value}, s.points)
			}
		})
		return nil
	})
	if err == nil && !ok {
		err = ErrForged
	}
	if err != nil {
		return fmt.Errorf("share %d: %w", share.Index, err)
	}
	return nil
}

func scalarOf(raw []byte) (group.Scalar, error) {
	s := field.NewScalar()
	if len(raw) != size {
		return nil, fmt.Errorf("%w: a share has %d bytes", ErrFormat, size)
	}
	if err := s.UnmarshalBinary(raw); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return s, nil
}

// Open returns the master secret. Each share is checked first, and all that is wrong with any
// is said: [ErrForeign], [ErrForged], [ErrRepeated], [ErrTooFew].
func (s *Sealed) Open(all []*Share) (*secret.Bytes, error) {
	var wrong []error
	given := map[int]bool{}
	for _, share := range all {
		switch err := s.Check(share); {
		case err != nil:
			wrong = append(wrong, err)
		case given[share.Index]:
			wrong = append(wrong, fmt.Errorf("share %d: %w", share.Index, ErrRepeated))
		default:
			given[share.Index] = true
		}
	}
	if len(given) < s.Threshold {
		wrong = append(wrong, fmt.Errorf("%w: %d of the %d that are needed", ErrTooFew, len(given), s.Threshold))
	}
	if err := errors.Join(wrong...); err != nil {
		return nil, err
	}
	var key *secret.Bytes
	var err error
	secret.Do(func() { key, err = s.recover(all) })
	if err != nil {
		return nil, err
	}
	defer key.Close()
	master, err := backend.Open(key, s.binding(), s.Box)
	if err != nil {
		return nil, fmt.Errorf("sealed master secret: %w", err)
	}
	return master, nil
}

// recover interpolates. No two shares are alike: circl would panic.
func (s *Sealed) recover(all []*Share) (*secret.Bytes, error) {
	var points []secretsharing.Share
	for _, share := range all {
		err := share.value.Use(func(raw []byte) error {
			value, err := scalarOf(raw)
			points = append(points, secretsharing.Share{ID: field.NewScalar().SetUint64(uint64(share.Index)), Value: value})
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	scalar, err := secretsharing.Recover(uint(s.Threshold-1), points)
	if err != nil {
		return nil, err
	}
	raw, err := scalar.MarshalBinary()
	if err != nil {
		return nil, err
	}
	return s.key(raw)
}

// Encode gives the file of a sealed secret.
func (s *Sealed) Encode() ([]byte, error) {
	data, err := json.MarshalIndent(s, "", "  ")
	return append(data, '\n'), err
}

// ParseSealed reads such a file, strictly. [ErrFormat].
func ParseSealed(data []byte) (*Sealed, error) {
	s := &Sealed{}
	if err := strict(data, MaxSealed, s); err != nil {
		return nil, fmt.Errorf("sealed master secret: %w", err)
	}
	if s.Version != version || s.Threshold < MinThreshold || s.Shares < s.Threshold || s.Shares > MaxShares || len(s.Commitments) != s.Threshold || s.binding().Validate() != nil {
		return nil, fmt.Errorf("sealed master secret: %w: version, counts or length", ErrFormat)
	}
	for _, c := range s.Commitments {
		p := field.NewElement()
		if len(c) != size {
			return nil, fmt.Errorf("sealed master secret: %w: a commitment", ErrFormat)
		}
		if err := p.UnmarshalBinary(c); err != nil {
			return nil, fmt.Errorf("sealed master secret: %w: %w", ErrFormat, err)
		}
		s.points = append(s.points, p)
	}
	return s, nil
}

// plainShare is a share as an operator's age file has it.
type plainShare struct {
	Version int    `json:"version"`
	Split   string `json:"split"`
	Index   int    `json:"index"`
	Value   []byte `json:"value"`
}

// Encode gives what is encrypted to one operator.
func (s *Share) Encode() (text *secret.Bytes, err error) {
	err = s.value.Use(func(raw []byte) (err error) {
		secret.Do(func() {
			var data []byte
			if data, err = json.Marshal(plainShare{version, s.Split, s.Index, raw}); err == nil {
				text, err = secret.From(append(data, '\n'))
			}
		})
		return err
	})
	return text, err
}

// ParseShare reads what Encode gave, strictly. [ErrFormat].
func ParseShare(text *secret.Bytes) (s *Share, err error) {
	err = text.Use(func(raw []byte) (err error) {
		secret.Do(func() {
			var p plainShare
			if err = strict(raw, MaxShare, &p); err != nil {
				return
			}
			id, hexErr := hex.DecodeString(p.Split)
			if p.Version != version || hexErr != nil || len(id) != 16 || p.Index < 1 || p.Index > MaxShares {
				err = fmt.Errorf("%w: version, split or index", ErrFormat)
				return
			}
			if _, err = scalarOf(p.Value); err != nil {
				return
			}
			var value *secret.Bytes
			if value, err = secret.From(p.Value); err == nil {
				s = &Share{p.Split, p.Index, value}
			}
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("share: %w", err)
	}
	return s, nil
}

func strict(data []byte, limit int, to any) error {
	if len(data) > limit {
		return fmt.Errorf("%w: more than %d bytes", ErrFormat, limit)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	err := d.Decode(to)
	if _, end := d.Token(); err == nil && !errors.Is(end, io.EOF) {
		err = errors.New("something comes after it")
	}
	if err != nil {
		return ErrFormat // its text may repeat what it read
	}
	return nil
}
