package awskms

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"slices"
)

// element is one of BER, of definite length.
func element(tag byte, content ...[]byte) []byte {
	body := slices.Concat(content...)
	switch n := len(body); {
	case n < 0x80:
		return append([]byte{tag, byte(n)}, body...)
	case n < 0x100:
		return append([]byte{tag, 0x81, byte(n)}, body...)
	default:
		return append([]byte{tag, 0x82, byte(n >> 8), byte(n)}, body...)
	}
}

// open is an element of indefinite length.
func open(tag byte, content ...[]byte) []byte {
	return slices.Concat([]byte{tag, 0x80}, slices.Concat(content...), []byte{0, 0})
}

func oid(numbers ...int) []byte {
	der, err := asn1.Marshal(asn1.ObjectIdentifier(numbers))
	if err != nil {
		panic(err) // a constant of this file
	}
	return der
}

// Envelop encrypts to a recipient in the form that the service answers with: an
// EnvelopedData in BER with indefinite lengths, whose recipient is named by a
// subject key identifier.
func Envelop(public *rsa.PublicKey, plain []byte) ([]byte, error) {
	content, iv := randomBytes(32), randomBytes(aes.BlockSize)
	key, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, content, nil)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(content)
	if err != nil {
		return nil, err
	}
	pad := aes.BlockSize - len(plain)%aes.BlockSize
	sealed := append(slices.Clone(plain), bytes.Repeat([]byte{byte(pad)}, pad)...)
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(sealed, sealed)
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	id := sha256.Sum256(spki)
	hash := element(0x30, oid(2, 16, 840, 1, 101, 3, 4, 2, 1), []byte{5, 0})
	oaep := element(0x30, oid(1, 2, 840, 113549, 1, 1, 7), element(0x30,
		element(0xa0, hash),
		element(0xa1, element(0x30, oid(1, 2, 840, 113549, 1, 1, 8), hash))))
	recipient := element(0x30, []byte{2, 1, 2}, element(0x80, id[:]), oaep, element(4, key))
	encrypted := open(0x30,
		oid(1, 2, 840, 113549, 1, 7, 1),
		element(0x30, oid(2, 16, 840, 1, 101, 3, 4, 1, 42), element(4, iv)),
		open(0xa0, element(4, sealed[:16]), element(4, sealed[16:])))
	return open(0x30, oid(1, 2, 840, 113549, 1, 7, 3),
		open(0xa0, open(0x30, []byte{2, 1, 2}, element(0x31, recipient), encrypted))), nil
}
