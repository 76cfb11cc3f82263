package aws

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/asn1"
	"errors"
	"fmt"
)

// An answer to a recipient is an EnvelopedData of RFC 5652 in BER. This parser
// knows that one structure: one recipient, RSAES-OAEP with SHA-256, AES-256-CBC.
// github.com/smallstep/pkcs7 finds a recipient by issuer and serial number only,
// where the service names it by a subject key identifier, and panics on padding
// that is longer than the content.

// maxEnveloped is what the service may answer in bytes.
const maxEnveloped = 6144

var (
	oidEnveloped = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 3}
	oidData      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidOAEP      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}
	oidMGF1      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 8}
	oidSpecified = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 9}
	oidSHA256    = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidAES256CBC = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}
)

var errCMS = errors.New("not an EnvelopedData of the expected form")

// enveloped is an EnvelopedData.
type enveloped struct {
	key     []byte // the content key, encrypted to the recipient
	iv      []byte
	content []byte
}

// The tags that occur.
const (
	tagInteger    = 0x02
	tagOctets     = 0x04
	tagNull       = 0x05
	tagOID        = 0x06
	tagSequence   = 0x30
	tagSet        = 0x31
	tagKeyID      = 0x80 // [0] IMPLICIT OCTET STRING
	tagExplicit0  = 0xa0
	tagExplicit1  = 0xa1
	tagExplicit2  = 0xa2
	tagContent    = 0x80
	tagContentMul = 0xa0 // the same in pieces
	constructed   = 0x20
)

func parseEnveloped(ber []byte) (*enveloped, error) {
	if len(ber) > maxEnveloped {
		return nil, fmt.Errorf("it has %d bytes", len(ber))
	}
	var e enveloped
	failed := false
	top := &reader{rest: ber, failed: &failed}
	info := top.enter(tagSequence)
	info.oid(oidEnveloped)
	wrapper := info.enter(tagExplicit0)
	data := wrapper.enter(tagSequence)
	data.integer(2)
	recipients := data.enter(tagSet)
	recipient := recipients.enter(tagSequence)
	recipient.integer(2)
	recipient.take(tagKeyID) // not compared: only our key opens what follows
	recipient.oaep()
	e.key = recipient.take(tagOctets)
	content := data.enter(tagSequence)
	content.oid(oidData)
	algorithm := content.enter(tagSequence)
	algorithm.oid(oidAES256CBC)
	e.iv = algorithm.take(tagOctets)
	if content.next() == tagContentMul {
		pieces := content.enter(tagContentMul)
		for pieces.next() == tagOctets {
			e.content = append(e.content, pieces.take(tagOctets)...)
		}
		pieces.end()
	} else {
		e.content = content.take(tagContent)
	}
	for _, r := range []*reader{algorithm, content, recipient, recipients, data, wrapper, info, top} {
		r.end()
	}
	if failed {
		return nil, errCMS
	}
	if len(e.key) != 256 || len(e.iv) != aes.BlockSize || len(e.content) == 0 || len(e.content)%aes.BlockSize != 0 {
		return nil, errCMS
	}
	return &e, nil
}

// oaep demands RSAES-OAEP with SHA-256 for both of its functions, and no label.
func (r *reader) oaep() {
	algorithm := r.enter(tagSequence)
	algorithm.oid(oidOAEP)
	params := algorithm.enter(tagSequence)
	hash := params.enter(tagExplicit0)
	hash.sha256()
	mask := params.enter(tagExplicit1)
	mgf := mask.enter(tagSequence)
	mgf.oid(oidMGF1)
	mgf.sha256()
	if params.next() == tagExplicit2 {
		source := params.enter(tagExplicit2)
		label := source.enter(tagSequence)
		label.oid(oidSpecified)
		if len(label.take(tagOctets)) != 0 {
			label.fail()
		}
		label.end()
		source.end()
	}
	for _, inner := range []*reader{hash, mgf, mask, params, algorithm} {
		inner.end()
	}
}

// decrypt opens the content. CBC does not authenticate it; padding that is wrong
// is noticed, and TLS says who answered.
func (e *enveloped) decrypt(key []byte) ([]byte, error) {
	if len(key) != 32 {
		return nil, errors.New("the content key is not one of AES-256")
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	plain := make([]byte, len(e.content))
	cipher.NewCBCDecrypter(block, e.iv).CryptBlocks(plain, e.content)
	n := int(plain[len(plain)-1])
	if n < 1 || n > aes.BlockSize || !bytes.Equal(plain[len(plain)-n:], bytes.Repeat([]byte{byte(n)}, n)) {
		clear(plain)
		return nil, errors.New("the padding of the content is wrong")
	}
	return plain[:len(plain)-n], nil
}

// reader walks the elements of one BER value. After a failure, which all readers
// of one input share, it yields nothing.
type reader struct {
	rest   []byte
	failed *bool
}

func (r *reader) fail() { *r.failed, r.rest = true, nil }

// next is the tag of the next element, or 0 at the end.
func (r *reader) next() byte {
	if len(r.rest) == 0 {
		return 0
	}
	return r.rest[0]
}

// end demands that nothing follows.
func (r *reader) end() {
	if len(r.rest) != 0 {
		r.fail()
	}
}

// take returns the content of the next element, which must have this tag.
func (r *reader) take(tag byte) []byte {
	if *r.failed || r.next() != tag {
		r.fail()
		return nil
	}
	content, size, ok := element(r.rest, 0)
	if !ok {
		r.fail()
		return nil
	}
	r.rest = r.rest[size:]
	return content
}

func (r *reader) enter(tag byte) *reader {
	return &reader{rest: r.take(tag), failed: r.failed}
}

func (r *reader) oid(want asn1.ObjectIdentifier) {
	der, err := asn1.Marshal(want)
	if err != nil || !bytes.Equal(r.take(tagOID), der[2:]) {
		r.fail()
	}
}

func (r *reader) integer(want byte) {
	if got := r.take(tagInteger); len(got) != 1 || got[0] != want {
		r.fail()
	}
}

// sha256 demands that algorithm, whose parameters are NULL or left out.
func (r *reader) sha256() {
	algorithm := r.enter(tagSequence)
	algorithm.oid(oidSHA256)
	if algorithm.next() != 0 && len(algorithm.take(tagNull)) != 0 {
		algorithm.fail()
	}
	algorithm.end()
}

// maxDepth is more than the structure has.
const maxDepth = 12

// element returns the content of the element that in begins with, and how long
// it is with its header. A length may be indefinite: the content then ends before
// two zeros in the place of an element.
func element(in []byte, depth int) (content []byte, size int, ok bool) {
	if depth > maxDepth || len(in) < 2 || in[0]&0x1f == 0x1f { // no tag above 30 occurs
		return nil, 0, false
	}
	length, header := int(in[1]), 2
	switch {
	case in[1] == 0x80:
		return indefinite(in, depth)
	case in[1] > 0x82: // 64 KiB are more than enough
		return nil, 0, false
	case in[1] > 0x80:
		n := int(in[1] & 0x7f)
		if len(in) < 2+n {
			return nil, 0, false
		}
		length = 0
		for _, b := range in[2 : 2+n] {
			length = length<<8 | int(b)
		}
		header += n
	}
	if len(in)-header < length {
		return nil, 0, false
	}
	return in[header : header+length], header + length, true
}

func indefinite(in []byte, depth int) (content []byte, size int, ok bool) {
	if in[0]&constructed == 0 {
		return nil, 0, false
	}
	for at := 2; len(in)-at >= 2; {
		if in[at] == 0 && in[at+1] == 0 {
			return in[2:at], at + 2, true
		}
		_, inner, ok := element(in[at:], depth+1)
		if !ok {
			return nil, 0, false
		}
		at += inner
	}
	return nil, 0, false
}
