// Package kms is where data-encryption keys (DEKs) come from.
//
// A [KMS] holds a key-encryption key (KEK) or speaks to a service that does. It
// derives DEKs from the KEK, or generates them and wraps them under it; callers
// cannot tell and need not. What must be kept to get a DEK again is a [Wrapped],
// which is not secret and proves itself: it opens only under the KEK, the volume,
// the purpose, the version and the length that it was made for.
//
// One package below this one is one backend. Each passes the suite of
// kms/kmstest. A [URI] names a backend with its parameters; kms/setup turns URIs
// into backends.
package kms

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/keyagent/keyagent/internal/secret"
)

// The bounds of a key's length in bytes.
const (
	MinLength = 16
	MaxLength = 64
)

// Purpose separates keys of one volume that are used for different things.
type Purpose string

// The purposes.
const (
	VolumeDEK Purpose = "volume-dek" // passphrase of a LUKS2 keyslot
	RecordMAC Purpose = "record-mac" // authenticates the key service's records
)

var (
	// ErrBinding: the binding is outside the bounds. Nothing was asked of the
	// backend.
	ErrBinding = errors.New("key binding is not allowed")
	// ErrWrongKey: the wrapped key does not open: it was made for another
	// binding, under another KEK, or was changed.
	ErrWrongKey = errors.New("wrapped key does not open")
	// ErrKEKVersion: the wrapped key names a KEK that this backend does not
	// have.
	ErrKEKVersion = fmt.Errorf("%w: its KEK is not here", ErrWrongKey)
	// ErrUnavailable: the backend cannot be reached or refuses to work at the
	// moment. Trying again later may help.
	ErrUnavailable = errors.New("key management service is unavailable")
	// ErrURI: a URI cannot be understood. The error never repeats the values
	// in it.
	ErrURI = errors.New("invalid URI")
)

// KMS makes and opens keys. It is safe for concurrent use. The caller closes
// every secret that it receives, and keeps those that it hands in.
type KMS interface {
	// Generate returns a new key for b and what must be kept to unwrap it.
	// A backend that derives keys returns the same key each time.
	Generate(ctx context.Context, b Binding) (*secret.Bytes, Wrapped, error)
	// Wrap wraps a key that came from elsewhere. Its length must be b.Length.
	Wrap(ctx context.Context, b Binding, key *secret.Bytes) (Wrapped, error)
	// Unwrap returns the key of w. A w that was not made for exactly b gives
	// an error that wraps ErrWrongKey.
	Unwrap(ctx context.Context, b Binding, w Wrapped) (*secret.Bytes, error)
}

// Binding says what a key is for. All of it is an input of derivation, or
// associated data of wrapping.
type Binding struct {
	VolumeID string  // the authorised ID, never something read from a disk
	Purpose  Purpose //
	Version  uint32  // of the key, from 1
	Length   int     // in bytes, MinLength to MaxLength
}

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// Validate returns an error that wraps [ErrBinding] if a field is out of
// bounds.
func (b Binding) Validate() error {
	switch {
	case !idPattern.MatchString(b.VolumeID) || strings.Contains(b.VolumeID, ".."):
		return fmt.Errorf("%w: volume ID", ErrBinding)
	case b.Purpose != VolumeDEK && b.Purpose != RecordMAC:
		return fmt.Errorf("%w: purpose", ErrBinding)
	case b.Version == 0:
		return fmt.Errorf("%w: version 0", ErrBinding)
	case b.Length < MinLength || b.Length > MaxLength:
		return fmt.Errorf("%w: length %d, allowed are %d to %d bytes", ErrBinding, b.Length, MinLength, MaxLength)
	}
	return nil
}

// Encode returns the unambiguous encoding of b under a domain: each string
// behind its length, numbers in 32 bits, all big-endian. It is specified in
// docs/spec/keys.md.
func (b Binding) Encode(domain string) []byte {
	var out []byte
	for _, s := range []string{domain, b.VolumeID, string(b.Purpose)} {
		out = append(binary.BigEndian.AppendUint32(out, uint32(len(s))), s...)
	}
	out = binary.BigEndian.AppendUint32(out, b.Version)
	return binary.BigEndian.AppendUint32(out, uint32(b.Length))
}

// Wrapped is what is kept of a key.
type Wrapped struct {
	// Scheme names how the key comes back, for example "hkdf-sha256".
	Scheme string `json:"scheme"`
	// KEK names the key-encryption key and its version.
	KEK string `json:"kek"`
	// Blob is the wrapped key; empty where keys are derived.
	Blob []byte `json:"blob,omitempty"`
}
