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
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/keyagent/keyagent/internal/pattern"
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
	VolumeDEK    Purpose = "volume-dek"    // passphrase of a LUKS2 keyslot
	RecordMAC    Purpose = "record-mac"    // authenticates the key service's records
	MasterSecret Purpose = "master-secret" // of the cluster KMS, wrapped by another one
	// KubernetesKEK is what keyagent kubekms encrypts with.
	KubernetesKEK Purpose = "kubernetes-kek"
)

var (
	// ErrBinding means that the binding is outside the bounds. Nothing was asked of the
	// backend.
	ErrBinding = errors.New("key binding is not allowed")
	// ErrWrongKey means that the wrapped key does not open: it was made for another
	// binding, under another KEK, or was changed.
	ErrWrongKey = errors.New("wrapped key does not open")
	// ErrKEKVersion means that the wrapped key names a KEK that this backend does not
	// have.
	ErrKEKVersion = fmt.Errorf("%w: its KEK is not here", ErrWrongKey)
	// ErrScheme means that the wrapped key was made by another kind of backend.
	ErrScheme = fmt.Errorf("%w: its scheme is not known here", ErrWrongKey)
	// ErrUnavailable means that the backend cannot be reached or does not work at the
	// moment. Trying again later may help.
	ErrUnavailable = errors.New("key management service is unavailable")
	// ErrThrottled means that the service still throttled us after the last retry.
	ErrThrottled = fmt.Errorf("%w: too many requests", ErrUnavailable)
	// ErrDenied means that the service knows who asks and does not allow it. The text
	// after it names the permission, in the words of that service.
	ErrDenied = errors.New("missing permission")
	// ErrCredentials means that the service does not know who asks: there are no
	// credentials, or they are wrong or have expired.
	ErrCredentials = errors.New("credentials are not accepted")
	// ErrKEK means that the key-encryption key is missing, disabled, pending deletion,
	// or cannot wrap keys.
	ErrKEK = errors.New("key-encryption key cannot be used")
	// ErrClosed means that the backend was closed.
	ErrClosed = secret.ErrClosed
	// ErrURI means that a URI cannot be understood. The error never repeats the values
	// in it.
	ErrURI = errors.New("invalid URI")
)

// KMS makes and opens keys. It is safe for concurrent use. The caller closes
// every secret that it receives, and keeps those that it hands in.
//
// Every method returns [ErrBinding] for a binding that is out of bounds, before it
// asks anybody; [ErrUnavailable], [ErrThrottled], [ErrDenied], [ErrCredentials] or
// [ErrKEK] where a service does not do what it is asked; and context.Canceled if
// ctx is cancelled.
type KMS interface {
	// Generate returns a new key for b and what must be kept to unwrap it.
	// A backend that derives keys returns the same key each time, of the same salt.
	Generate(ctx context.Context, b Binding) (*Secret, Wrapped, error)
	// Wrap wraps a key that came from elsewhere. Its length must be b.Length.
	Wrap(ctx context.Context, b Binding, key *Secret) (Wrapped, error)
	// Unwrap returns the key of w. A w that was not made for exactly b gives
	// an error that wraps ErrWrongKey.
	Unwrap(ctx context.Context, b Binding, w Wrapped) (*Secret, error)
}

// Namer is implemented by backends that can say under which KEK they wrap now.
// All of this module do.
type Namer interface {
	// Current returns what Wrap would set as Wrapped.KEK: it tells a wrapped
	// key that is up to date from one that is to be wrapped again.
	Current(ctx context.Context) (string, error)
}

// Current names the KEK that k wraps under now, see [Namer].
func Current(ctx context.Context, k KMS) (string, error) {
	n, ok := k.(Namer)
	if !ok {
		return "", errors.New("this key management backend does not name its KEK")
	}
	return n.Current(ctx)
}

// MaxBlob bounds Wrapped.Blob in bytes. A longer one is refused before any
// service sees it.
const MaxBlob = 16 << 10

// Secret is a key in memory that is locked, not dumped, and wiped by Close. It
// has no printable form; Use lends its bytes.
type Secret = secret.Bytes

// NewSecret moves p into a Secret: p is overwritten with zeros, also on error.
func NewSecret(p []byte) (*Secret, error) { return secret.From(p) }

// Binding says what a key is for. All of it is an input of derivation, or
// associated data of wrapping.
type Binding struct {
	VolumeID string  // the authorised ID, never something read from a disk
	Purpose  Purpose // which of the volume's keys
	Version  uint32  // of the key, from 1
	Length   int     // in bytes, MinLength to MaxLength
	// Salt is random, 32 bytes in hex, and kept beside what is kept of the key. A key that is
	// derived with one cannot be derived again once that is destroyed. Empty: none.
	Salt string
}

// saltSize is the size of a salt in bytes.
const saltSize = 32

// NewSalt returns a random salt.
func NewSalt() string {
	salt := make([]byte, saltSize)
	rand.Read(salt) // never fails
	return hex.EncodeToString(salt)
}

// Salter is implemented by backends that derive keys, for which a salt is what makes erasing
// one possible.
type Salter interface {
	// Salts reports whether keys of volumes are derived, and may have a salt.
	Salts() bool
}

// Salts reports whether k derives the keys of volumes, see [Salter].
func Salts(k KMS) bool {
	s, ok := k.(Salter)
	return ok && s.Salts()
}

var idPattern = pattern.New(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// Validate returns an error that wraps [ErrBinding] if a field is out of
// bounds.
func (b Binding) Validate() error {
	switch {
	case !idPattern.MatchString(b.VolumeID) || strings.Contains(b.VolumeID, ".."):
		return fmt.Errorf("%w: volume ID", ErrBinding)
	case b.Purpose != VolumeDEK && b.Purpose != RecordMAC && b.Purpose != KubernetesKEK && b.Purpose != MasterSecret:
		return fmt.Errorf("%w: purpose", ErrBinding)
	case b.Version == 0:
		return fmt.Errorf("%w: version 0", ErrBinding)
	case b.Length < MinLength || b.Length > MaxLength:
		return fmt.Errorf("%w: length %d, allowed are %d to %d bytes", ErrBinding, b.Length, MinLength, MaxLength)
	case b.Salt != "" && (b.Purpose != VolumeDEK || !isSalt(b.Salt)):
		return fmt.Errorf("%w: salt", ErrBinding)
	}
	return nil
}

func isSalt(s string) bool {
	raw, err := hex.DecodeString(s)
	return err == nil && len(raw) == saltSize && hex.EncodeToString(raw) == s
}

// Encode returns the unambiguous encoding of b under a domain: each string
// behind its length, numbers in 32 bits, all big-endian, and last [Binding.SaltID] if there
// is a salt. It is specified in docs/spec/keys.md.
func (b Binding) Encode(domain string) []byte {
	var out []byte
	for _, s := range []string{domain, b.VolumeID, string(b.Purpose)} {
		out = append(binary.BigEndian.AppendUint32(out, uint32(len(s))), s...)
	}
	out = binary.BigEndian.AppendUint32(out, b.Version)
	out = binary.BigEndian.AppendUint32(out, uint32(b.Length))
	if b.Salt == "" {
		return out
	}
	id := b.SaltID()
	return append(binary.BigEndian.AppendUint32(out, uint32(len(id))), id...)
}

// SaltID tells salts apart, and is what services and their logs see of one: a key is not
// derived from it. Empty without a salt.
func (b Binding) SaltID() string {
	if b.Salt == "" {
		return ""
	}
	sum := sha256.Sum256([]byte("keyagent salt id v1" + b.Salt))
	return hex.EncodeToString(sum[:])
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
