package luks

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
)

// The fields of a LUKS2 binary header: offsets in its 4096 bytes. Numbers are
// big-endian, text is padded with NULs.
const (
	offMagic     = 0
	offVersion   = 6
	offSize      = 8
	offSeqID     = 16
	offLabel     = 24
	offAlgorithm = 72
	offSalt      = 104
	offUUID      = 168
	offSubsystem = 208
	offHdrOffset = 256
	offPadding   = 264
	offChecksum  = 448
	offPadding2  = 512

	checksumAlgorithm = "sha256"
)

var (
	primaryMagic   = []byte("LUKS\xba\xbe")
	secondaryMagic = []byte("SKUL\xba\xbe")
)

// binaryHeader is what one copy says of itself once its checksum holds and
// everything that may have one value only has it.
type binaryHeader struct {
	seqID uint64
	uuid  string
	json  []byte // the whole JSON area, aliasing the input
}

// parseBinary checks copy i of the metadata: its binary header and the checksum
// over it and its JSON area.
func parseBinary(metadata []byte, i int) (binaryHeader, error) {
	var h binaryHeader
	where := func(field string) string { return copyNames[i] + " " + field }
	if !bytes.Equal(metadata[offMagic:offVersion], copyMagics[i]) {
		return h, refuse(RuleMagic, where("magic"), string(metadata[offMagic:offVersion]))
	}
	be := binary.BigEndian
	if v := be.Uint16(metadata[offVersion:]); v != 2 {
		return h, refuse(RuleMagic, where("version"), fmt.Sprint(v))
	}
	if n := be.Uint64(metadata[offSize:]); n != metadataSize {
		return h, refuse(RuleBinaryHeader, where("size"), fmt.Sprint(n))
	}
	if n := be.Uint64(metadata[offHdrOffset:]); n != uint64(i*metadataSize) {
		return h, refuse(RuleBinaryHeader, where("offset"), fmt.Sprint(n))
	}
	for _, f := range []struct {
		name, want string
		field      []byte
	}{
		{"checksum algorithm", checksumAlgorithm, metadata[offAlgorithm:offSalt]},
		{"label", "", metadata[offLabel:offAlgorithm]},
		{"subsystem", "", metadata[offSubsystem:offHdrOffset]},
		{"padding", "", metadata[offPadding:offChecksum]},
		{"checksum field", "", metadata[offChecksum+sha256.Size : offPadding2]},
		{"padding", "", metadata[offPadding2:binarySize]},
	} {
		if got, ok := paddedText(f.field); !ok || got != f.want {
			return h, refuse(RuleBinaryHeader, where(f.name), got)
		}
	}
	if sum := checksum(metadata); !bytes.Equal(sum[:], metadata[offChecksum:offChecksum+sha256.Size]) {
		return h, refuse(RuleChecksum, where("checksum"), "")
	}
	h.seqID = be.Uint64(metadata[offSeqID:])
	if h.seqID == 0 {
		return h, refuse(RuleBinaryHeader, where("sequence number"), "0")
	}
	uuid, ok := paddedText(metadata[offUUID:offSubsystem])
	if !ok || !uuidPattern.MatchString(uuid) {
		return h, refuse(RuleBinaryHeader, where("UUID"), uuid)
	}
	h.uuid = uuid
	h.json = metadata[binarySize:metadataSize]
	return h, nil
}

// checksum is SHA-256 over one copy with its checksum field taken as zero.
func checksum(metadata []byte) (sum [sha256.Size]byte) {
	h := sha256.New()
	h.Write(metadata[:offChecksum])
	h.Write(make([]byte, offPadding2-offChecksum))
	h.Write(metadata[offPadding2:metadataSize])
	h.Sum(sum[:0])
	return sum
}

// paddedText returns the text before the first NUL, and whether nothing but
// NULs follows it.
func paddedText(field []byte) (string, bool) {
	text, rest, _ := bytes.Cut(field, []byte{0})
	return string(text), allZero(rest)
}

func allZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}

var zeros [64 << 10]byte
