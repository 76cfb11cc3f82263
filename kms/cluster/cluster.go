// Package cluster is the cluster KMS: the key service itself holds the KEK, a
// master secret, and derives every DEK from it. No DEK is ever stored.
//
// Derivation is HKDF-SHA256 (RFC 5869) over the master secret, an optional salt
// and the unambiguous encoding of the binding as info, so that volume, purpose,
// version and length each give another key. Wrapping, for keys that come from
// elsewhere, is AES-256-GCM under a key that is derived likewise. Vectors are in
// docs/spec/keys.md.
package cluster

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
)

// Schemes of a kms.Wrapped.
const (
	schemeDerived = "hkdf-sha256"
	schemeWrapped = "aes-256-gcm"
	// schemeConstellation derives as Constellation's key service did, and schemeLibrary
	// as the library below it.
	schemeConstellation = "constellation-hkdf-sha256"
	schemeLibrary       = "constellation-library-hkdf-sha256"
)

// Domains of the info that HKDF receives.
const (
	domainDerive = "keyagent derived key v1"
	domainID     = "keyagent KEK id v1"
	domainWrapEK = "keyagent wrapping KEK v1"
)

// The bounds of a master secret in bytes, and the size of a generated one.
const (
	MinMasterSecret = 16
	MaxMasterSecret = 128
	NewMasterSecret = 32
)

// Options configure [New].
type Options struct {
	// MasterSecret is the KEK. Required. The KMS keeps nothing of it.
	MasterSecret *kms.Secret
	// Salt of HKDF. It is not secret. Default none.
	Salt []byte
	// Derivation is how volume keys are made. Default [Own].
	Derivation Derivation
}

// Derivation is how volume keys are made of the master secret.
type Derivation string

// The derivations. Those of Constellation are for what comes from there: the name of
// a key is its ID as it stands, and there is one version of it.
const (
	Own Derivation = ""
	// Constellation is that of its key service: a LUKS UUID in lower case is the name
	// of a volume's key, "s3proxy-kek" and "measurementSecret" are others.
	Constellation Derivation = "constellation"
	// ConstellationLibrary is that of its Go library, which puts nothing before a name.
	ConstellationLibrary Derivation = "constellation-library"
)

// scheme of the keys that a derivation makes.
var schemes = map[Derivation]string{Own: schemeDerived, Constellation: schemeConstellation, ConstellationLibrary: schemeLibrary}

// KMS derives keys from a master secret. Close wipes it.
type KMS struct {
	// prk is what HKDF-Extract makes of the master secret and the salt. Nothing
	// else is needed of them.
	prk        *secret.Bytes
	id         string
	derivation Derivation
}

var (
	_ kms.KMS    = (*KMS)(nil)
	_ kms.Namer  = (*KMS)(nil)
	_ kms.Salter = (*KMS)(nil)
)

// New returns a KMS.
func New(opts Options) (*KMS, error) {
	if opts.MasterSecret == nil || opts.MasterSecret.Len() < MinMasterSecret || opts.MasterSecret.Len() > MaxMasterSecret {
		return nil, fmt.Errorf("master secret must have %d to %d bytes", MinMasterSecret, MaxMasterSecret)
	}
	if _, ok := schemes[opts.Derivation]; !ok {
		return nil, fmt.Errorf("unknown derivation %q", opts.Derivation)
	}
	prk, err := extract(opts.MasterSecret, opts.Salt)
	if err != nil {
		return nil, err
	}
	k := &KMS{prk: prk, derivation: opts.Derivation}
	id, err := k.derive([]byte(domainID), 8)
	if err != nil {
		return nil, errors.Join(err, prk.Close())
	}
	defer id.Close()
	// The KEK's name is derived from it one-way, so that another master secret
	// is noticed and not taken for this one.
	err = id.Use(func(b []byte) error { k.id = "cluster:" + hex.EncodeToString(b); return nil })
	return k, err
}

// Close wipes what was made of the master secret.
func (k *KMS) Close() error { return k.prk.Close() }

// KEK names the master secret without revealing it.
func (k *KMS) KEK() string { return k.id }

// Current implements kms.Namer.
func (k *KMS) Current(ctx context.Context) (string, error) { return k.id, ctx.Err() }

// Salts implements kms.Salter. What Constellation derived has none.
func (k *KMS) Salts() bool { return k.derivation == Own }

func extract(master *secret.Bytes, salt []byte) (prk *secret.Bytes, err error) {
	err = master.Use(func(m []byte) error {
		secret.Do(func() {
			var out []byte
			if out, err = hkdf.Extract(sha256.New, m, salt); err == nil {
				prk, err = secret.From(out)
			}
		})
		return err
	})
	return prk, err
}

func (k *KMS) derive(info []byte, length int) (*secret.Bytes, error) {
	key, err := secret.New(length)
	if err != nil {
		return nil, err
	}
	text := string(info)
	err = key.Use(func(to []byte) error {
		return k.prk.Use(func(prk []byte) (err error) {
			// As little as possible is in here: what is allocated inside costs
			// more than the derivation.
			secret.Do(func() {
				var out []byte
				if out, err = hkdf.Expand(sha256.New, prk, text, length); err == nil {
					copy(to, out)
				}
			})
			return err
		})
	})
	if err != nil {
		return nil, errors.Join(err, key.Close())
	}
	return key, nil
}

// Generate implements kms.KMS. The same binding gives the same key.
func (k *KMS) Generate(ctx context.Context, b kms.Binding) (*kms.Secret, kms.Wrapped, error) {
	if err := errors.Join(ctx.Err(), b.Validate()); err != nil {
		return nil, kms.Wrapped{}, err
	}
	w := kms.Wrapped{Scheme: schemeDerived, KEK: k.id}
	if b.Purpose == kms.VolumeDEK {
		w.Scheme = schemes[k.derivation]
	}
	key, err := k.derived(b, w.Scheme)
	if err != nil {
		return nil, kms.Wrapped{}, err
	}
	return key, w, nil
}

func (k *KMS) derived(b kms.Binding, scheme string) (*secret.Bytes, error) {
	if scheme == schemeDerived {
		info := b.Encode(domainDerive)
		return k.derive(append(info, b.Salt...), b.Length) // its ID, of fixed length, stands before it
	}
	if b.Salt != "" {
		return nil, fmt.Errorf("%w: a key as Constellation made it has no salt", kms.ErrBinding)
	}
	if b.Version != 1 {
		return nil, fmt.Errorf("%w: a key as Constellation made it has version 1 alone", kms.ErrBinding)
	}
	// The ID as it is: two of them never have one key.
	info := b.VolumeID
	if scheme == schemeConstellation {
		info = "key-" + info
	}
	return k.derive([]byte(info), b.Length)
}

// Wrap implements kms.KMS.
func (k *KMS) Wrap(ctx context.Context, b kms.Binding, key *kms.Secret) (kms.Wrapped, error) {
	if err := errors.Join(ctx.Err(), b.Validate()); err != nil {
		return kms.Wrapped{}, err
	}
	kek, err := k.derive([]byte(domainWrapEK), 32)
	if err != nil {
		return kms.Wrapped{}, err
	}
	defer kek.Close()
	blob, err := backend.Seal(kek, b, key)
	return kms.Wrapped{Scheme: schemeWrapped, KEK: k.id, Blob: blob}, err
}

// Unwrap implements kms.KMS.
func (k *KMS) Unwrap(ctx context.Context, b kms.Binding, w kms.Wrapped) (*kms.Secret, error) {
	if err := errors.Join(ctx.Err(), b.Validate()); err != nil {
		return nil, err
	}
	if w.KEK != k.id {
		return nil, fmt.Errorf("%w: it was created under %q, here is %q", kms.ErrKEKVersion, w.KEK, k.id)
	}
	switch w.Scheme {
	case schemeDerived, schemeConstellation, schemeLibrary:
		if len(w.Blob) != 0 {
			return nil, fmt.Errorf("%w: a derived key has no blob", kms.ErrWrongKey)
		}
		if w.Scheme != schemeDerived && (w.Scheme != schemes[k.derivation] || b.Purpose != kms.VolumeDEK) {
			return nil, fmt.Errorf("%w: it is derived as Constellation did, which is not enabled", kms.ErrWrongKey)
		}
		return k.derived(b, w.Scheme)
	case schemeWrapped:
		return k.open(b, w.Blob)
	}
	return nil, fmt.Errorf("%w: %.32q", kms.ErrScheme, w.Scheme)
}

func (k *KMS) open(b kms.Binding, blob []byte) (*secret.Bytes, error) {
	kek, err := k.derive([]byte(domainWrapEK), 32)
	if err != nil {
		return nil, err
	}
	defer kek.Close()
	return backend.Open(kek, b, blob)
}

// LoadMasterSecret reads a master secret of raw bytes. The file must belong to
// root or to this user, and be readable by nobody else.
func LoadMasterSecret(path string) (*kms.Secret, error) {
	s, err := config.ReadSecretFile(path, MaxMasterSecret)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w (hint: keyagent serve --init-master-secret makes one, once)", err)
	}
	return longEnough(s, err)
}

// LoadCredential reads a master secret from a systemd credential of this
// service, see systemd.exec(5), LoadCredential=.
func LoadCredential(name string) (*kms.Secret, error) {
	return longEnough(config.ReadCredential(name, MaxMasterSecret))
}

func longEnough(s *secret.Bytes, err error) (*secret.Bytes, error) {
	if err != nil {
		return nil, fmt.Errorf("master secret: %w", err)
	}
	if s.Len() < MinMasterSecret {
		return nil, errors.Join(fmt.Errorf("master secret: %w: %d bytes, at least %d", secret.ErrSize, s.Len(), MinMasterSecret), s.Close())
	}
	return s, nil
}

// InitMasterSecret writes a new master secret to path. A file that exists is
// an error: nothing is ever overwritten. The file appears with all of its content,
// or not at all: one that is cut off would keep every later start from making
// another.
func InitMasterSecret(path string) error {
	if err := initMasterSecret(path); err != nil {
		return fmt.Errorf("new master secret: %w", err)
	}
	return nil
}

func initMasterSecret(path string) error {
	s, err := secret.Random(NewMasterSecret)
	if err != nil {
		return err
	}
	defer s.Close()
	return config.WriteSecretFile(path, s)
}
