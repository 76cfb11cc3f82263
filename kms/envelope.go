package kms

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/internal/secret"
)

// envelopeDomain begins the associated data of an envelope.
const envelopeDomain = "keyagent wrapped key v1"

// GenerateWrapped is Generate for backends that cannot derive: a random key, and
// what wrap makes of it.
func GenerateWrapped(ctx context.Context, b Binding, wrap func(context.Context, Binding, *Secret) (Wrapped, error)) (*Secret, Wrapped, error) {
	if err := b.Validate(); err != nil {
		return nil, Wrapped{}, err
	}
	key, err := secret.Random(b.Length)
	if err != nil {
		return nil, Wrapped{}, err
	}
	w, err := wrap(ctx, b, key)
	if err != nil {
		return nil, Wrapped{}, errors.Join(err, key.Close())
	}
	return key, w, nil
}

// SealEnvelope wraps key under kek, a key of 16, 24 or 32 bytes that the caller
// holds: a random nonce of 12 bytes, then AES-GCM with the encoding of b as
// associated data. It is for backends whose KEK is at hand, and for services
// that have no associated data of their own.
func SealEnvelope(kek *Secret, b Binding, key *Secret) ([]byte, error) {
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

// OpenEnvelope returns the key in blob, or an error that wraps [ErrWrongKey].
func OpenEnvelope(kek *Secret, b Binding, blob []byte) (key *Secret, err error) {
	if err := b.Validate(); err != nil {
		return nil, err
	}
	err = withGCM(kek, func(a cipher.AEAD) error {
		if len(blob) != b.Length+a.Overhead() {
			return fmt.Errorf("%w: it has %d bytes", ErrWrongKey, len(blob))
		}
		p, err := a.Open(nil, nil, blob, b.Encode(envelopeDomain))
		if err != nil {
			return ErrWrongKey
		}
		key, err = secret.From(p)
		return err
	})
	return key, err
}

func withGCM(kek *Secret, f func(cipher.AEAD) error) error {
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
