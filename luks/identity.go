package luks

import (
	"fmt"

	"github.com/keyagent/keyagent/internal/pattern"
	"github.com/keyagent/keyagent/internal/secret"
)

// Identity binds a header to what the key service knows of the volume. All
// three fields enter the key of the header's [MAC] and of the format marker, so
// that neither verifies for another volume, another disk or an older
// generation of the same one.
type Identity struct {
	// Volume is the authorised volume ID: a letter or digit, then at most 127
	// letters, digits, dots, underscores and hyphens.
	Volume string
	// UUID is the LUKS2 UUID in canonical form, lower case with hyphens.
	UUID string
	// Generation counts how often the volume was formatted anew.
	Generation uint64
}

// Bounds of a DEK in bytes.
const (
	MinKeySize = 16
	MaxKeySize = 64
)

// Key is a DEK, in memory that is locked, not dumped, and wiped by Close. It has no
// printable form; Use lends its bytes. The caller closes it. It is the same type as
// a Secret of package kms, so that what a KMS gave opens a volume as it is.
type Key = secret.Bytes

// NewKey moves p into a Key: p is overwritten with zeros, also on error.
func NewKey(p []byte) (*Key, error) { return secret.From(p) }

var (
	volumePattern = pattern.New(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	uuidPattern   = pattern.New(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	// A device-mapper UUID has 128 characters, of which the prefix and the LUKS
	// UUID take 45; what is left is kept for the name.
	namePattern = pattern.New(`^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$`)
)

func (id Identity) validate() error {
	if !volumePattern.MatchString(id.Volume) {
		return fmt.Errorf("%w: volume ID %.40q", ErrInvalid, id.Volume)
	}
	if !uuidPattern.MatchString(id.UUID) {
		return fmt.Errorf("%w: volume %q: UUID %.40q is not in canonical form", ErrInvalid, id.Volume, id.UUID)
	}
	return nil
}

func validateName(name string) error {
	if !namePattern.MatchString(name) {
		return fmt.Errorf("%w: mapping name %.40q", ErrInvalid, name)
	}
	return nil
}

// validateKey refuses what cannot be a DEK before it is used for anything. An
// all-zero key is what a caller's bug, or a key service that hands out blanks,
// looks like.
func validateKey(dek *Key) error {
	if dek == nil {
		return fmt.Errorf("%w: no key was given", ErrInvalidKey)
	}
	if n := dek.Len(); n < MinKeySize || n > MaxKeySize {
		return fmt.Errorf("%w: it has %d bytes, allowed are %d to %d", ErrInvalidKey, n, MinKeySize, MaxKeySize)
	}
	return dek.Use(func(key []byte) error {
		var bits byte
		for _, b := range key {
			bits |= b
		}
		if bits == 0 {
			return fmt.Errorf("%w: every byte is zero", ErrInvalidKey)
		}
		return nil
	})
}
