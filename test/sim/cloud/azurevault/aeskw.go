package azurevault

import (
	"bytes"
	"crypto/aes"
	"encoding/binary"
	"errors"
	"slices"
)

// The AES key wrap of RFC 3394, with its default initial value.

var initial = bytes.Repeat([]byte{0xa6}, 8)

var errKeyWrap = errors.New("not a wrapped key")

func wrapAES(kek, key []byte) ([]byte, error) {
	if len(key) < 16 || len(key)%8 != 0 {
		return nil, errKeyWrap
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, err
	}
	out := slices.Concat(initial, key)
	n := len(key) / 8
	var b [16]byte
	for t := 1; t <= 6*n; t++ {
		at := out[((t-1)%n+1)*8:][:8]
		copy(b[:8], out[:8])
		copy(b[8:], at)
		block.Encrypt(b[:], b[:])
		binary.BigEndian.PutUint64(out, binary.BigEndian.Uint64(b[:8])^uint64(t))
		copy(at, b[8:])
	}
	return out, nil
}

func unwrapAES(kek, wrapped []byte) ([]byte, error) {
	if len(wrapped) < 24 || len(wrapped)%8 != 0 {
		return nil, errKeyWrap
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, err
	}
	out := slices.Clone(wrapped)
	n := len(wrapped)/8 - 1
	var b [16]byte
	for t := 6 * n; t >= 1; t-- {
		at := out[((t-1)%n+1)*8:][:8]
		binary.BigEndian.PutUint64(b[:8], binary.BigEndian.Uint64(out)^uint64(t))
		copy(b[8:], at)
		block.Decrypt(b[:], b[:])
		copy(out, b[:8])
		copy(at, b[8:])
	}
	if !bytes.Equal(out[:8], initial) {
		return nil, errKeyWrap
	}
	return out[8:], nil
}
