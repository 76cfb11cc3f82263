package luks

import (
	"bytes"
	"crypto/hmac"
	"encoding/binary"
)

// The format marker: one sector that claims a blank device for a format that is
// under way. Its layout is in the package documentation.
const (
	markerMagic   = "KEYAGENT\x00FORMAT\x00"
	markerVersion = 1

	offMarkerVersion    = 16
	offMarkerGeneration = 24
	offMarkerUUID       = 32
	offMarkerVolume     = 72
	offMarkerTag        = sectorSize - len(MAC{})
)

// newMarker makes the marker. It holds nothing random, so there is one marker
// for one DEK and one Identity and verifying it is comparing it.
func newMarker(id Identity, dek *Key) ([]byte, error) {
	return taggedSector(markerMagic, markerLabel, id, nil, dek)
}

// taggedSector makes a sector that only who has the DEK can make, for one Identity: what
// marker and marks are. With more it is of an attempt.
func taggedSector(magic, label string, id Identity, more []byte, dek *Key) ([]byte, error) {
	m := make([]byte, sectorSize)
	copy(m, magic)
	binary.BigEndian.PutUint32(m[offMarkerVersion:], markerVersion)
	binary.BigEndian.PutUint64(m[offMarkerGeneration:], id.Generation)
	copy(m[offMarkerUUID:offMarkerVolume], id.UUID)
	copy(m[offMarkerVolume:offMarkAttempt], id.Volume)
	copy(m[offMarkAttempt:], more)
	sum, err := tag(dek, derivationInfo(label, id), m[:offMarkerTag])
	if err != nil {
		return nil, err
	}
	copy(m[offMarkerTag:], sum[:])
	return m, nil
}

// isMarker says whether a sector claims to be a marker of any volume.
func isMarker(sector []byte) bool { return bytes.HasPrefix(sector, []byte(markerMagic)) }

// markerVerifies says whether a sector is the marker of this DEK and Identity.
func markerVerifies(sector []byte, id Identity, dek *Key) (bool, error) {
	if dek == nil || !isMarker(sector) {
		return false, nil
	}
	want, err := newMarker(id, dek)
	if err != nil {
		return false, err
	}
	return hmac.Equal(sector, want), nil
}
