package uki

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"debug/pe"
	"encoding/binary"
	"errors"
	"slices"
)

// Offsets in a PE image, from the start of its optional header (Microsoft
// PE/COFF specification, "Optional Header").
const (
	offChecksum    = 64
	offSizeHeaders = 60
	offNumDirs     = 108 // PE32+
	offDirs        = 112
	certTable      = 4 // index of the attribute certificate table
)

var errPE = errors.New("not a well-formed 64-bit EFI image")

// authenticodeDigest is the SHA-256 that firmware measures for an EFI image:
// all of it but the checksum, the entry of the certificate table and the
// certificates, with sections in the order of the file. It follows the
// PE/COFF Authenticode specification as EDK II reads it: an image without a
// signature is not padded, which signing tools do.
func authenticodeDigest(image []byte) ([]byte, error) {
	file, err := pe.NewFile(bytes.NewReader(image))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if _, ok := file.OptionalHeader.(*pe.OptionalHeader64); !ok || len(image) < 0x40 {
		return nil, errPE
	}
	opt := int(binary.LittleEndian.Uint32(image[0x3c:])) + 4 + 20
	if opt < 0 || opt+offDirs > len(image) {
		return nil, errPE
	}
	headers := int(binary.LittleEndian.Uint32(image[opt+offSizeHeaders:]))
	dirs := int(binary.LittleEndian.Uint32(image[opt+offNumDirs:]))
	entry := opt + offDirs + certTable*8
	if headers > len(image) || entry+8 > headers || dirs <= certTable {
		return nil, errPE
	}
	certSize := int(binary.LittleEndian.Uint32(image[entry+4:]))

	h := sha256.New()
	h.Write(image[:opt+offChecksum])
	h.Write(image[opt+offChecksum+4 : entry])
	h.Write(image[entry+8 : headers])
	hashed := headers
	sections := slices.Clone(file.Sections)
	slices.SortStableFunc(sections, func(a, b *pe.Section) int { return cmp.Compare(a.Offset, b.Offset) })
	for _, s := range sections {
		if s.Size == 0 {
			continue
		}
		from, to := int(s.Offset), int(s.Offset)+int(s.Size)
		if from < 0 || to > len(image) {
			return nil, errPE
		}
		h.Write(image[from:to])
		hashed += int(s.Size)
	}
	switch rest := len(image) - certSize; {
	case certSize > len(image) || hashed > rest:
		return nil, errPE
	case hashed < rest:
		h.Write(image[hashed:rest])
	}
	return h.Sum(nil), nil
}
