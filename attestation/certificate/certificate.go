// Package certificate reads X.509 certificates as makers of TPMs have written them.
//
// crypto/x509 refuses a certificate whose serial number is negative or padded, and
// knows no RSA key that is marked for OAEP. Makers have put such certificates into
// millions of machines, and their authorities have issued others with them. This
// package reads them all the same, and changes nothing that a signature covers: the
// bytes that are verified are the original ones. It never makes a chain or a signature
// good.
package certificate

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"

	"golang.org/x/crypto/cryptobyte"
	tags "golang.org/x/crypto/cryptobyte/asn1"
)

// Parse reads one certificate in DER, and nothing behind it.
func Parse(der []byte) (*x509.Certificate, error) {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		var serialErr error
		if c, serialErr = withOddSerial(der); serialErr != nil {
			return nil, err
		}
	}
	if c.PublicKey == nil {
		c.PublicKey = oaepKey(c.RawSubjectPublicKeyInfo)
		if c.PublicKey != nil {
			c.PublicKeyAlgorithm = x509.RSA
		}
	}
	return c, nil
}

// withOddSerial parses a copy with a serial number that crypto/x509 reads, and then
// puts the original bytes and the number that they encode back.
func withOddSerial(der []byte) (*x509.Certificate, error) {
	var whole, tbs, version, serial cryptobyte.String
	input := cryptobyte.String(der)
	hasVersion := false
	if !input.ReadASN1(&whole, tags.SEQUENCE) || !input.Empty() || !whole.ReadASN1(&tbs, tags.SEQUENCE) {
		return nil, errors.New("not a certificate")
	}
	rest := tbs
	if !rest.ReadOptionalASN1(&version, &hasVersion, tags.Tag(0).Constructed().ContextSpecific()) ||
		!rest.ReadASN1(&serial, tags.INTEGER) || len(serial) == 0 || len(serial) > maxSerial {
		return nil, errors.New("no serial number")
	}
	var b cryptobyte.Builder
	b.AddASN1(tags.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(tags.SEQUENCE, func(b *cryptobyte.Builder) {
			if hasVersion {
				b.AddASN1(tags.Tag(0).Constructed().ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes(version) })
			}
			b.AddASN1BigInt(new(big.Int).SetBytes(serial))
			b.AddBytes(rest)
		})
		b.AddBytes(whole)
	})
	readable, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(readable)
	if err != nil {
		return nil, err
	}
	c.Raw = bytes.Clone(der)
	c.RawTBSCertificate = original(c.Raw)
	c.SerialNumber = signed(serial)
	return c, nil
}

// maxSerial bounds a serial number in bytes. RFC 5280 allows 20.
const maxSerial = 64

// original is the part of a certificate that its signature covers.
func original(der []byte) []byte {
	var whole, tbs cryptobyte.String
	input := cryptobyte.String(der)
	input.ReadASN1(&whole, tags.SEQUENCE)
	whole.ReadASN1Element(&tbs, tags.SEQUENCE)
	return tbs
}

func signed(content []byte) *big.Int {
	n := new(big.Int).SetBytes(content)
	if content[0]&0x80 != 0 {
		n.Sub(n, new(big.Int).Lsh(big.NewInt(1), uint(8*len(content))))
	}
	return n
}

// id-RSAES-OAEP of RFC 4055: an RSA key that is for encryption only, as an endorsement
// key is.
var oidOAEP = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}

// oaepKey is the RSA key of a certificate that marks it for OAEP, or nil.
func oaepKey(spki []byte) any {
	var info struct {
		Algorithm struct {
			OID        asn1.ObjectIdentifier
			Parameters asn1.RawValue `asn1:"optional"`
		}
		Key asn1.BitString
	}
	if rest, err := asn1.Unmarshal(spki, &info); err != nil || len(rest) > 0 || !info.Algorithm.OID.Equal(oidOAEP) {
		return nil
	}
	var key struct {
		N *big.Int
		E int
	}
	if rest, err := asn1.Unmarshal(info.Key.RightAlign(), &key); err != nil || len(rest) > 0 || key.N.Sign() <= 0 || key.E < 3 {
		return nil
	}
	return &rsa.PublicKey{N: key.N, E: key.E}
}

// Unwrap takes a certificate out of the NV index of a TPM: makers fill the index behind
// it with one byte over and over, and some put the header of TPM 1.2 before it, a
// TCG_PCCLIENT_STORED_CERT (TCG PC Client Specific Implementation Specification for
// Conventional BIOS, section 7.4).
func Unwrap(nv []byte) []byte {
	if len(nv) > 5 && bytes.Equal(nv[:3], []byte{0x10, 0x01, 0x00}) {
		size := int(binary.BigEndian.Uint16(nv[3:]))
		body := nv[5:min(len(nv), 5+size)]
		if len(body) > 2 && body[0] == 0x10 && body[1] == 0x02 { // TCG_FULL_CERT
			body = body[2:]
		}
		nv = body
	}
	var element cryptobyte.String
	input := cryptobyte.String(nv)
	if !input.ReadAnyASN1Element(&element, new(tags.Tag)) {
		return nv
	}
	if fill := []byte(input); len(fill) > 0 && len(bytes.Trim(fill, string(fill[:1]))) == 0 {
		return element
	}
	return nv
}

// Split takes concatenated certificates apart, at most most of them. What fills up the
// end is left out, as by [Unwrap].
func Split(nv []byte, most int) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for rest := cryptobyte.String(nv); len(rest) > 0; {
		var element cryptobyte.String
		if len(bytes.Trim(rest, string(rest[:1]))) == 0 && rest[0] != 0x30 {
			break
		}
		if !rest.ReadASN1Element(&element, tags.SEQUENCE) {
			return nil, fmt.Errorf("certificate %d is cut off", len(all)+1)
		}
		if len(all) == most {
			return nil, fmt.Errorf("more than %d certificates", most)
		}
		c, err := Parse(element)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(all)+1, err)
		}
		all = append(all, c)
	}
	return all, nil
}
