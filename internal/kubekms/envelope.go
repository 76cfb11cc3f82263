package kubekms

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"

	"github.com/keyagent/keyagent/internal/secret"
)

// purpose is what a ciphertext is for: one of one API does not open in the other.
type purpose string

const (
	purposeV1 purpose = "kms v1beta1"
	purposeV2 purpose = "kms v2"
)

const (
	envelopeVersion = 1
	domainEnvelope  = "keyagent kubekms envelope v1"
	saltLength      = 16
	gcmOverhead     = 12 + 16
	headerLength    = 1 + idLength + saltLength
)

// envelopeOverhead is what an envelope adds to its plaintext.
const envelopeOverhead = headerLength + gcmOverhead

// seal returns an envelope: version, key_id, salt, nonce, ciphertext and tag.
//
// The AES key is derived from the KEK and the salt for this one message: v1beta1
// asks for one message per write of an object, without end, and random nonces
// under one key would not do for more than 2³² of them. The KEK's own bytes are
// then used as an AES key by the format of 2018 alone.
func (k *key) seal(p purpose, plain []byte) ([]byte, error) {
	out := make([]byte, headerLength, envelopeOverhead+len(plain))
	out[0] = envelopeVersion
	copy(out[1:], k.raw[:])
	rand.Read(out[1+idLength:])
	err := k.gcm(out[1+idLength:headerLength], func(a cipher.AEAD) error {
		out = a.Seal(out, nil, plain, k.associated(p))
		return nil
	})
	return out, err
}

// open returns what seal made, or ErrDecrypt, or secret.ErrClosed.
func (k *key) open(p purpose, blob []byte) (plain []byte, err error) {
	if id, ok := envelopeKey(blob); !ok || id != k.raw {
		return nil, ErrDecrypt
	}
	err = k.gcm(blob[1+idLength:headerLength], func(a cipher.AEAD) (err error) {
		if plain, err = a.Open(nil, nil, blob[headerLength:], k.associated(p)); err != nil {
			return ErrDecrypt
		}
		return nil
	})
	return plain, err
}

// envelopeKey returns the key_id in an envelope, and whether blob can be one.
func envelopeKey(blob []byte) (id [idLength]byte, ok bool) {
	if len(blob) < envelopeOverhead || blob[0] != envelopeVersion {
		return id, false
	}
	return [idLength]byte(blob[1:]), true
}

// associated is the associated data: each string behind its length in 32 bits.
func (k *key) associated(p purpose) []byte {
	var out []byte
	for _, s := range []string{domainEnvelope, string(p), k.id} {
		out = append(binary.BigEndian.AppendUint32(out, uint32(len(s))), s...)
	}
	return out
}

func (k *key) gcm(salt []byte, f func(cipher.AEAD) error) error {
	return k.secret.Use(func(kek []byte) (err error) {
		secret.Do(func() {
			var message []byte
			if message, err = hkdf.Key(sha256.New, kek, salt, domainEnvelope, 32); err != nil {
				return
			}
			defer clear(message)
			var block cipher.Block
			if block, err = aes.NewCipher(message); err != nil {
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
