package luks

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/keyagent/keyagent/internal/secret"
)

// MAC authenticates one header for one [Identity] under one DEK. The key service
// keeps it in the volume's record; it is not secret.
type MAC [sha256.Size]byte

// Labels of the two keys that are derived from a DEK. They differ so that a
// marker can never be taken for a MAC.
const (
	macLabel    = "keyagent luks2 header mac v1"
	markerLabel = "keyagent luks2 format marker v1"
)

// authentic is a guarded header whose origin is proved: by its MAC, or, where
// none is recorded yet, by the DEK having opened its keyslot. libcryptsetup
// activates nothing else.
type authentic struct {
	raw  []byte
	uuid string
}

// authenticate verifies a guarded header against its volume and its MAC.
func authenticate(g guarded, id Identity, want MAC, dek *secret.Bytes) (authentic, error) {
	if g.uuid != id.UUID {
		return authentic{}, mismatch(g, id)
	}
	got, err := headerMAC(g, id, dek)
	if err != nil {
		return authentic{}, err
	}
	if !hmac.Equal(got[:], want[:]) {
		return authentic{}, ErrHeaderMAC
	}
	return authentic(g), nil
}

func mismatch(g guarded, id Identity) error {
	return fmt.Errorf("%w: its UUID is %s, expected is %s", ErrVolumeMismatch, g.uuid, id.UUID)
}

// headerMAC is HMAC-SHA256 over the guarded bytes.
func headerMAC(g guarded, id Identity, dek *secret.Bytes) (MAC, error) {
	return tag(dek, macLabel, id, g.raw)
}

// tag derives the key of label and id from the DEK and makes the HMAC-SHA256 of
// message under it.
func tag(dek *secret.Bytes, label string, id Identity, message []byte) (mac MAC, err error) {
	info := derivationInfo(label, id)
	useErr := dek.Use(func(ikm []byte) error {
		secret.Do(func() {
			var key []byte
			if key, err = hkdf.Key(sha256.New, ikm, nil, info, sha256.Size); err != nil {
				return
			}
			defer secret.Wipe(key)
			h := hmac.New(sha256.New, key)
			h.Write(message)
			h.Sum(mac[:0])
		})
		return err
	})
	if useErr != nil {
		return MAC{}, fmt.Errorf("derive key from DEK: %w", useErr)
	}
	return mac, nil
}

// derivationInfo encodes label and id so that no two different pairs have the
// same encoding: every part of variable length is preceded by its length.
func derivationInfo(label string, id Identity) string {
	be := binary.BigEndian
	info := []byte(label)
	info = be.AppendUint32(info, uint32(len(id.Volume)))
	info = append(info, id.Volume...)
	info = be.AppendUint64(info, id.Generation)
	info = be.AppendUint32(info, uint32(len(id.UUID)))
	info = append(info, id.UUID...)
	return string(info)
}
