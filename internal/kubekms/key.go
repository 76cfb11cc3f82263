package kubekms

import (
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"

	"github.com/keyagent/keyagent/internal/secret"
)

const (
	domainKeyID = "keyagent kubekms key id v1"
	idLength    = 16 // of a key_id, before it is written in hex
)

// key is one KEK with its name. The name is derived from the KEK: replicas with the
// same KEK agree on it, two KEKs never share one, and it reveals nothing.
type key struct {
	id     string
	raw    [idLength]byte
	secret *secret.Bytes
}

// newKey takes over s, also on error.
func newKey(s *secret.Bytes) (*key, error) {
	k := &key{secret: s}
	err := s.Use(func(b []byte) error {
		if !validLength(len(b)) {
			return errLength(len(b))
		}
		var sum []byte
		var err error
		secret.Do(func() { sum, err = hkdf.Key(sha256.New, b, nil, domainKeyID, idLength) })
		copy(k.raw[:], sum)
		return err
	})
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	k.id = hex.EncodeToString(k.raw[:])
	return k, nil
}

func validLength(n int) bool { return n == 16 || n == 24 || n == 32 }

// KeyID returns the key_id of a KEK, which the caller keeps.
func KeyID(s *secret.Bytes) (string, error) {
	c, err := s.Clone()
	if err != nil {
		return "", err
	}
	k, err := newKey(c)
	if err != nil {
		return "", err
	}
	return k.id, c.Close()
}
