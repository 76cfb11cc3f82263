package luks

import (
	"crypto/hmac"
	"encoding/binary"
	"errors"
	"fmt"
)

// The two copies of the metadata differ in their magic, their offset, their salt
// and their checksum. libcryptsetup gives each a random salt, and uses it for
// nothing but to make their checksums differ. Headers of version 2 have the
// complement of the primary's salt in the secondary, so that one good copy and the
// keyslot are the whole header.

// copyNames are the names of the copies, by their number.
var copyNames = [2]string{"primary", "secondary"}

var copyMagics = [2][]byte{primaryMagic, secondaryMagic}

// pairSalts makes a header of version 2 of one that libcryptsetup wrote.
func pairSalts(raw []byte) { fillCopy(raw, 0) }

// fillCopy makes the other copy of the good one.
func fillCopy(raw []byte, good int) {
	other := 1 - good
	from, to := raw[good*metadataSize:(good+1)*metadataSize], raw[other*metadataSize:(other+1)*metadataSize]
	copy(to, from)
	copy(to[offMagic:offVersion], copyMagics[other])
	binary.BigEndian.PutUint64(to[offHdrOffset:], uint64(other*metadataSize))
	for i := offSalt; i < offUUID; i++ {
		to[i] = ^from[i]
	}
	sum := checksum(to)
	copy(to[offChecksum:], sum[:])
}

// verify holds bytes against the record's MACs and gives the header, rebuilt in
// memory if one copy of it is damaged.
func verify(raw []byte, id Identity, want MACs, dek *Key) (*Header, error) {
	if err := want.validate(); err != nil {
		return nil, err
	}
	g, err := guard(raw)
	if err == nil {
		err = authenticate(g, id, want.Header, dek)
	}
	if err == nil {
		return &Header{raw: g.raw, uuid: g.uuid, form: g.form, bytes: g.bytes, macs: want, damaged: undamaged}, nil
	}
	refused := errors.Is(err, ErrHeaderRefused) || errors.Is(err, ErrHeaderMAC) || errors.Is(err, ErrVolumeMismatch)
	if !refused || !want.rebuildable() {
		return nil, err
	}
	var good []int
	for i := range copyNames {
		ok, copyErr := copyVerifies(raw, i, id, want.Copies[i], dek)
		if copyErr != nil {
			return nil, copyErr
		}
		if ok {
			good = append(good, i)
		}
	}
	if len(good) != 1 {
		return nil, err
	}
	rebuilt := append([]byte(nil), raw...)
	fillCopy(rebuilt, good[0])
	// The record's first MAC covers the whole: what was rebuilt is bit for bit
	// what was recorded.
	if g, err = guard(rebuilt); err == nil {
		err = authenticate(g, id, want.Header, dek)
	}
	if err != nil {
		return nil, fmt.Errorf("rebuilt from the %s copy: %w", copyNames[good[0]], err)
	}
	return &Header{raw: g.raw, uuid: g.uuid, form: g.form, bytes: g.bytes, macs: want, damaged: 1 - good[0]}, nil
}

// copyVerifies says whether a copy satisfies the guard and its own MAC. An error is
// none of the copy's.
func copyVerifies(raw []byte, i int, id Identity, want MAC, dek *Key) (bool, error) {
	g, err := guardCopy(raw[i*metadataSize:(i+1)*metadataSize], i)
	if err == nil {
		g, err = g.within(raw)
	}
	if err != nil || g.uuid != id.UUID {
		return false, nil
	}
	got, err := copyMAC(g.raw, i, id, dek)
	return err == nil && hmac.Equal(got[:], want[:]), err
}

// authenticate verifies a guarded header against its volume and its MAC.
func authenticate(g guarded, id Identity, want MAC, dek *Key) error {
	if g.uuid != id.UUID {
		return mismatch(g, id)
	}
	got, err := headerMAC(g, id, dek)
	if err != nil {
		return err
	}
	if !hmac.Equal(got[:], want[:]) {
		return ErrHeaderMAC
	}
	return nil
}

func mismatch(g guarded, id Identity) error {
	return fmt.Errorf("%w: its UUID is %s, expected is %s", ErrVolumeMismatch, g.uuid, id.UUID)
}
