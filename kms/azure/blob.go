package azure

import (
	"encoding/binary"
	"errors"
)

// The algorithms by which a vault wraps a content key.
const (
	algorithmRSA = "RSA-OAEP-256"
	algorithmAES = "A256KW"
)

// A blob is the number of this format and three fields, each behind its length in
// 16 bits, big-endian. Nothing follows.
const blobFormat = 1

// The bounds of the fields in bytes: of RSA with 2048 to 8192 bits, and of a DEK
// with the nonce and the tag of its envelope.
const (
	minWrapped, maxWrapped = 40, 1024
	minSealed, maxSealed   = 12 + 16 + 16, 12 + 64 + 16
)

// blob is what is kept of a DEK.
type blob struct {
	algorithm string // of wrapped
	wrapped   []byte // the content key, by the vault
	sealed    []byte // the DEK, under the content key
}

var errBlob = errors.New("not a blob of azure kms")

func (b blob) valid() bool {
	return (b.algorithm == algorithmRSA || b.algorithm == algorithmAES) &&
		len(b.wrapped) >= minWrapped && len(b.wrapped) <= maxWrapped &&
		len(b.sealed) >= minSealed && len(b.sealed) <= maxSealed
}

func (b blob) encode() ([]byte, error) {
	if !b.valid() {
		return nil, errBlob
	}
	out := []byte{blobFormat}
	for _, field := range [][]byte{[]byte(b.algorithm), b.wrapped, b.sealed} {
		out = append(binary.BigEndian.AppendUint16(out, uint16(len(field))), field...)
	}
	return out, nil
}

func parseBlob(data []byte) (blob, error) {
	if len(data) == 0 || data[0] != blobFormat {
		return blob{}, errBlob
	}
	data = data[1:]
	var fields [3][]byte
	for i := range fields {
		if len(data) < 2 {
			return blob{}, errBlob
		}
		n := int(binary.BigEndian.Uint16(data))
		if data = data[2:]; len(data) < n {
			return blob{}, errBlob
		}
		fields[i], data = data[:n], data[n:]
	}
	b := blob{string(fields[0]), fields[1], fields[2]}
	if len(data) != 0 || !b.valid() {
		return blob{}, errBlob
	}
	return b, nil
}
