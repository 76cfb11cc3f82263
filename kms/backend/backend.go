// Package backend is what key management backends have in common: what they check, and
// an envelope for those whose KEK is at hand.
package backend

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
)

// envelopeDomain begins the associated data of an envelope.
const envelopeDomain = "keyagent wrapped key v1"

// Generate is Generate for backends that cannot derive: a random key, and
// what wrap makes of it.
func Generate(ctx context.Context, b kms.Binding, wrap func(context.Context, kms.Binding, *kms.Secret) (kms.Wrapped, error)) (*kms.Secret, kms.Wrapped, error) {
	if err := b.Validate(); err != nil {
		return nil, kms.Wrapped{}, err
	}
	key, err := secret.Random(b.Length)
	if err != nil {
		return nil, kms.Wrapped{}, err
	}
	w, err := wrap(ctx, b, key)
	if err != nil {
		return nil, kms.Wrapped{}, errors.Join(err, key.Close())
	}
	return key, w, nil
}

// Seal wraps key under kek, a key of 16, 24 or 32 bytes that the caller
// holds: a random nonce of 12 bytes, then AES-GCM with the encoding of b as
// associated data. It is for backends whose KEK is at hand, and for services
// that have no associated data of their own.
func Seal(kek *kms.Secret, b kms.Binding, key *kms.Secret) ([]byte, error) {
	if err := CheckWrap(context.Background(), b, key); err != nil {
		return nil, err
	}
	var blob []byte
	err := withGCM(kek, func(a cipher.AEAD) error {
		return key.Use(func(p []byte) error {
			blob = a.Seal(nil, nil, p, b.Encode(envelopeDomain))
			return nil
		})
	})
	return blob, err
}

// Open returns the key in blob, or an error that wraps [kms.ErrWrongKey].
func Open(kek *kms.Secret, b kms.Binding, blob []byte) (key *kms.Secret, err error) {
	if err := b.Validate(); err != nil {
		return nil, err
	}
	err = withGCM(kek, func(a cipher.AEAD) error {
		if len(blob) != b.Length+a.Overhead() {
			return fmt.Errorf("%w: it has %d bytes", kms.ErrWrongKey, len(blob))
		}
		p, err := a.Open(nil, nil, blob, b.Encode(envelopeDomain))
		if err != nil {
			return kms.ErrWrongKey
		}
		key, err = secret.From(p)
		return err
	})
	return key, err
}

func withGCM(kek *kms.Secret, f func(cipher.AEAD) error) error {
	return kek.Use(func(k []byte) (err error) {
		secret.Do(func() {
			var block cipher.Block
			if block, err = aes.NewCipher(k); err != nil {
				return
			}
			var a cipher.AEAD
			if a, err = cipher.NewGCMWithRandomNonce(block); err != nil {
				return
			}
			err = f(a)
		})
		return err
	})
}

// CheckWrap is what every Wrap begins with.
func CheckWrap(ctx context.Context, b kms.Binding, key *kms.Secret) error {
	if err := errors.Join(ctx.Err(), b.Validate()); err != nil {
		return err
	}
	if key.Len() != b.Length {
		return fmt.Errorf("%w: the key has %d bytes, the binding says %d", kms.ErrBinding, key.Len(), b.Length)
	}
	return nil
}

// CheckUnwrap is what every Unwrap of a backend with one scheme begins with.
func CheckUnwrap(ctx context.Context, b kms.Binding, w kms.Wrapped, scheme string) error {
	if err := errors.Join(ctx.Err(), b.Validate()); err != nil {
		return err
	}
	switch {
	case w.Scheme != scheme:
		return fmt.Errorf("%w: %.32q", kms.ErrScheme, w.Scheme)
	case w.KEK == "" || len(w.KEK) > 1024:
		return fmt.Errorf("%w: it names no KEK", kms.ErrKEKVersion)
	case len(w.Blob) == 0 || len(w.Blob) > kms.MaxBlob:
		return fmt.Errorf("%w: it has %d bytes", kms.ErrWrongKey, len(w.Blob))
	}
	return nil
}
