package luks

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/keyagent/keyagent/internal/secret"
)

// MAC authenticates one header, or one copy of its metadata with the keyslot, for
// one [Identity] under one DEK. It is not secret.
type MAC [sha256.Size]byte

// MACs is what a volume's record keeps of its header.
type MACs struct {
	// Header covers the whole header. It is never zero.
	Header MAC
	// Copies cover one copy of the metadata each, primary and secondary, and the
	// keyslot. Both are zero for a header of version 1, which cannot be rebuilt.
	Copies [2]MAC
}

func (m MACs) validate() error {
	switch {
	case m.Header == MAC{}:
		return fmt.Errorf("%w: no MAC was given", ErrHeaderMAC)
	case m.Copies[0] == MAC{} != (m.Copies[1] == MAC{}):
		return fmt.Errorf("%w: the MAC of one copy is missing", ErrHeaderMAC)
	}
	return nil
}

// rebuildable says whether there are MACs of the copies.
func (m MACs) rebuildable() bool { return m.Copies[0] != MAC{} && m.Copies[1] != MAC{} }

// Labels of the keys that are derived from a DEK. They differ so that a marker can
// never be taken for a MAC.
const (
	macLabel     = "keyagent luks2 header mac v1"
	copyMACLabel = "keyagent luks2 header mac v2"
	markerLabel  = "keyagent luks2 format marker v1"
	markLabel    = "keyagent luks2 filesystem mark v1"
	cloneLabel   = "keyagent luks2 clone mark v1"
)

// headerMACs makes all three MACs of a header.
func headerMACs(g guarded, id Identity, dek *Key) (m MACs, err error) {
	if m.Header, err = headerMAC(g, id, dek); err != nil {
		return MACs{}, err
	}
	for i := range m.Copies {
		if m.Copies[i], err = copyMAC(g.raw, i, id, dek); err != nil {
			return MACs{}, err
		}
	}
	return m, nil
}

// headerMAC is HMAC-SHA256 over the guarded bytes.
func headerMAC(g guarded, id Identity, dek *Key) (MAC, error) {
	return tag(dek, derivationInfo(macLabel, id), g.raw)
}

// copyMAC is HMAC-SHA256 over copy i of the metadata and the keyslot's area.
func copyMAC(raw []byte, i int, id Identity, dek *Key) (MAC, error) {
	label := string(binary.BigEndian.AppendUint32([]byte(copyMACLabel), uint32(i)))
	return tag(dek, derivationInfo(label, id), raw[i*metadataSize:(i+1)*metadataSize], raw[areasOffset:])
}

// tag derives the key of info from the DEK and makes the HMAC-SHA256 of the
// message under it.
func tag(dek *Key, info string, message ...[]byte) (mac MAC, err error) {
	useErr := dek.Use(func(ikm []byte) error {
		secret.Do(func() {
			var key []byte
			if key, err = hkdf.Key(sha256.New, ikm, nil, info, sha256.Size); err != nil {
				return
			}
			defer secret.Wipe(key)
			h := hmac.New(sha256.New, key)
			for _, part := range message {
				h.Write(part)
			}
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
