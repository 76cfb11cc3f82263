package kubekms

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"

	"github.com/keyagent/keyagent/internal/secret"
)

// legacyPrefix begins every ciphertext of the daemon of 2018: IV, then AES-CBC with
// the padding of PKCS #7. Nothing authenticates it. The daemon had another name later,
// "citadel", and wrote the same behind laterPrefix.
const (
	legacyPrefix = ":ck:aescbc:v1:"
	laterPrefix  = ":c5l:aescbc:v1:"
)

func isLegacy(blob []byte) bool { _, ok := cutLegacy(blob); return ok }

// cutLegacy returns what is behind either prefix.
func cutLegacy(blob []byte) ([]byte, bool) {
	if body, ok := bytes.CutPrefix(blob, []byte(legacyPrefix)); ok {
		return body, true
	}
	return bytes.CutPrefix(blob, []byte(laterPrefix))
}

// sealLegacy returns prefix, IV and padded ciphertext.
func (k *key) sealLegacy(plain []byte) ([]byte, error) {
	pad := aes.BlockSize - len(plain)%aes.BlockSize
	out := make([]byte, len(legacyPrefix)+aes.BlockSize, len(legacyPrefix)+aes.BlockSize+len(plain)+pad)
	copy(out, legacyPrefix)
	iv := out[len(legacyPrefix):]
	rand.Read(iv)
	body := append(bytes.Clone(plain), bytes.Repeat([]byte{byte(pad)}, pad)...)
	defer secret.Wipe(body)
	err := k.cbc(func(b cipher.Block) {
		out = out[:cap(out)]
		cipher.NewCBCEncrypter(b, iv).CryptBlocks(out[len(legacyPrefix)+aes.BlockSize:], body)
	})
	return out, err
}

// openLegacy opens a ciphertext of 2018 under each of the keys, since it does not say
// under which it is. All of them do the same work whatever comes out, and every
// failure is ErrDecrypt: a padding that is right is not told from one that is wrong
// by anything but the plaintext.
//
// A wrong key gives a valid padding in one of 256 cases. Where more than one key
// does, a padding of a whole block decides: kube-apiserver's keys of 32 bytes have
// it, and a wrong key gives it with a probability of 2⁻¹²⁸. If none or several have
// it, nobody can tell, and it is not guessed.
func openLegacy(keys []*key, blob []byte) ([]byte, error) {
	body, ok := cutLegacy(blob)
	// At least the IV and one block, which holds at least the padding.
	if !ok || len(body) < 2*aes.BlockSize || len(body)%aes.BlockSize != 0 {
		return nil, ErrDecrypt
	}
	iv, body := body[:aes.BlockSize], body[aes.BlockSize:]
	plains := make([][]byte, len(keys))
	valid, whole := 0, 0
	var first, firstWhole int // which key, from 1; the first that fits
	for i, k := range keys {
		plain := make([]byte, len(body))
		if err := k.cbc(func(b cipher.Block) { cipher.NewCBCDecrypter(b, iv).CryptBlocks(plain, body) }); err != nil {
			return nil, err
		}
		plains[i] = plain
		fits := paddingFits(plain)
		isWhole := fits & subtle.ConstantTimeByteEq(plain[len(plain)-1], aes.BlockSize)
		first = subtle.ConstantTimeSelect(fits&subtle.ConstantTimeEq(int32(valid), 0), i+1, first)
		firstWhole = subtle.ConstantTimeSelect(isWhole&subtle.ConstantTimeEq(int32(whole), 0), i+1, firstWhole)
		valid += fits
		whole += isWhole
	}
	chosen := 0
	chosen = subtle.ConstantTimeSelect(subtle.ConstantTimeEq(int32(whole), 1), firstWhole, chosen)
	chosen = subtle.ConstantTimeSelect(subtle.ConstantTimeEq(int32(valid), 1), first, chosen)
	for i, plain := range plains {
		if i+1 != chosen {
			secret.Wipe(plain)
		}
	}
	if chosen == 0 {
		return nil, ErrDecrypt
	}
	plain := plains[chosen-1]
	return plain[:len(plain)-int(plain[len(plain)-1])], nil
}

// paddingFits returns 1 if plain ends with a padding of PKCS #7, else 0. It looks at
// the whole last block in every case.
func paddingFits(plain []byte) int {
	last := plain[len(plain)-aes.BlockSize:]
	pad := int(last[aes.BlockSize-1])
	fits := subtle.ConstantTimeLessOrEq(1, pad) & subtle.ConstantTimeLessOrEq(pad, aes.BlockSize)
	for i := range aes.BlockSize {
		inPad := subtle.ConstantTimeLessOrEq(aes.BlockSize-i, pad)
		same := subtle.ConstantTimeByteEq(last[i], byte(pad))
		fits &= subtle.ConstantTimeSelect(inPad, same, 1)
	}
	return fits
}

func (k *key) cbc(f func(cipher.Block)) error {
	return k.secret.Use(func(kek []byte) (err error) {
		secret.Do(func() {
			var b cipher.Block
			if b, err = aes.NewCipher(kek); err == nil {
				f(b)
			}
		})
		return err
	})
}
