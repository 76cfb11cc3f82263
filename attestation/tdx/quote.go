package tdx

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"github.com/google/go-tdx-guest/abi"
)

// Sizes of Intel's TDX DCAP Quoting Library API, appendix A: quotes of version 4
// and 5. Numbers are little-endian.
const (
	headerSize    = 48
	body10Size    = 584
	body15Size    = 648
	reportSize    = 384 // of the quoting enclave, an SGX report
	signatureSize = 64

	typeBody10 = 2
	typeBody15 = 3

	certifiedByQE  = 6 // certification data: report and certification of a QE
	certifiedByPCK = 5 // certification data: a PEM chain
)

// intelQE is the QE vendor ID of Intel.
var intelQE = []byte{0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07}

// Quote is a parsed quote. Nothing of it is verified.
type Quote struct {
	// Version is 4 or 5.
	Version uint16
	// ReportData is what the TD had signed.
	ReportData [64]byte

	body   body
	raw    []byte // without what follows it in the kernel's buffer
	signed []byte // what the attestation key signs

	signature      []byte
	attestationKey []byte // X and Y
	qe             enclave
	qeSignature    []byte
	qeAuthData     []byte
	chain          []byte // PEM
}

// body is a TD report, of version 1.0 or 1.5. Fields are slices of the quote.
type body struct {
	teeTCBSVN, mrSeam, mrSignerSeam, seamAttributes []byte
	tdAttributes, xfam, mrTD                        []byte
	mrConfigID, mrOwner, mrOwnerConfig              []byte
	rtmr                                            [4][]byte
	teeTCBSVN2, mrServiceTD                         []byte // 1.5 only
}

// enclave is the report of the quoting enclave.
type enclave struct {
	raw                              []byte
	miscSelect, attributes, mrSigner []byte
	prodID, svn                      uint16
	reportData                       []byte
}

// Parse reads a quote of version 4 or 5. Lengths are exact; only NULs may follow,
// as the kernel's buffer of a fixed size leaves them. What it returns aliases
// quote.
func Parse(quote []byte) (*Quote, error) {
	if len(quote) > maxQuote {
		return nil, fmt.Errorf("%w: quote of %d bytes, at most %d", ErrMalformed, len(quote), maxQuote)
	}
	c := &cursor{rest: quote}
	q := &Quote{}
	if err := q.parseHeader(c); err != nil {
		return nil, err
	}
	size, err := q.parseBodyType(c)
	if err != nil {
		return nil, err
	}
	q.parseBody(&cursor{rest: c.take(size)}, size)
	q.signed = quote[:len(quote)-len(c.rest)]
	auth := &cursor{rest: c.take(int(c.u32()))}
	if c.short {
		return nil, fmt.Errorf("%w: quote ends early", ErrMalformed)
	}
	if len(bytes.Trim(c.rest, "\x00")) > 0 {
		return nil, fmt.Errorf("%w: %d bytes follow the quote", ErrMalformed, len(c.rest))
	}
	q.raw = quote[:len(quote)-len(c.rest)]
	return q, q.parseAuth(auth)
}

func (q *Quote) parseHeader(c *cursor) error {
	h := &cursor{rest: c.take(headerSize)}
	q.Version = h.u16()
	keyType, tee := h.u16(), h.u32()
	reserved, vendor := h.take(4), h.take(16)
	switch {
	case c.short:
		return fmt.Errorf("%w: quote ends early", ErrMalformed)
	case q.Version != 4 && q.Version != 5:
		return fmt.Errorf("%w: quote version %d, only 4 and 5 are known", ErrMalformed, q.Version)
	case keyType != abi.AttestationKeyType:
		return fmt.Errorf("%w: attestation key type %d is not ECDSA over P-256", ErrMalformed, keyType)
	case tee != abi.TeeTDX:
		return fmt.Errorf("%w: TEE type %#x is not TDX", ErrMalformed, tee)
	case !zero(reserved):
		return fmt.Errorf("%w: reserved bytes of the header are set", ErrMalformed)
	case !bytes.Equal(vendor, intelQE):
		return fmt.Errorf("%w: QE vendor %x is not Intel", ErrMalformed, vendor)
	}
	return nil
}

// parseBodyType returns the size of the body. A quote of version 4 has a TD report
// 1.0; one of version 5 says what it has.
func (q *Quote) parseBodyType(c *cursor) (int, error) {
	if q.Version == 4 {
		return body10Size, nil
	}
	kind, size := c.u16(), c.u32()
	for _, known := range []struct {
		kind uint16
		size int
	}{{typeBody10, body10Size}, {typeBody15, body15Size}} {
		if kind == known.kind && int64(size) == int64(known.size) {
			return known.size, nil
		}
	}
	return 0, fmt.Errorf("%w: body of type %d with %d bytes", ErrMalformed, kind, size)
}

func (q *Quote) parseBody(c *cursor, size int) {
	b := &q.body
	b.teeTCBSVN = c.take(16)
	b.mrSeam, b.mrSignerSeam, b.seamAttributes = c.take(48), c.take(48), c.take(8)
	b.tdAttributes, b.xfam, b.mrTD = c.take(8), c.take(8), c.take(48)
	b.mrConfigID, b.mrOwner, b.mrOwnerConfig = c.take(48), c.take(48), c.take(48)
	for i := range b.rtmr {
		b.rtmr[i] = c.take(48)
	}
	copy(q.ReportData[:], c.take(64))
	if size == body15Size {
		b.teeTCBSVN2, b.mrServiceTD = c.take(16), c.take(48)
	}
}

// parseAuth reads the signature data: the quote's signature and key, and inside
// of the certification data what makes that key Intel's.
func (q *Quote) parseAuth(c *cursor) error {
	q.signature, q.attestationKey = c.take(signatureSize), c.take(64)
	if kind := c.u16(); kind != certifiedByQE {
		return fmt.Errorf("%w: certification data of type %d, not %d", ErrMalformed, kind, certifiedByQE)
	}
	if size := c.u32(); int64(size) != int64(len(c.rest)) {
		return fmt.Errorf("%w: certification data says %d bytes and has %d", ErrMalformed, size, len(c.rest))
	}
	q.qe = parseEnclave(c.take(reportSize))
	q.qeSignature = c.take(signatureSize)
	q.qeAuthData = c.take(int(c.u16()))
	if kind := c.u16(); kind != certifiedByPCK {
		return fmt.Errorf("%w: the quoting enclave's certification data has type %d, not %d", ErrMalformed, kind, certifiedByPCK)
	}
	if size := c.u32(); int64(size) != int64(len(c.rest)) {
		return fmt.Errorf("%w: PCK chain says %d bytes and has %d", ErrMalformed, size, len(c.rest))
	}
	q.chain = c.rest
	if c.short || len(q.chain) == 0 || len(q.chain) > maxChain {
		return fmt.Errorf("%w: PCK chain of %d bytes", ErrMalformed, len(q.chain))
	}
	return nil
}

// parseEnclave reads an SGX report body.
func parseEnclave(raw []byte) enclave {
	c := &cursor{rest: raw}
	e := enclave{raw: raw}
	c.take(16) // CPUSVN
	e.miscSelect = c.take(4)
	c.take(28)
	e.attributes = c.take(16)
	c.take(32 + 32) // MRENCLAVE
	e.mrSigner = c.take(32)
	c.take(96)
	e.prodID, e.svn = c.u16(), c.u16()
	c.take(60)
	e.reportData = c.take(64)
	return e
}

// cursor takes fields off the front. Once something was too short, all is.
type cursor struct {
	rest  []byte
	short bool
}

func (c *cursor) take(n int) []byte {
	if n < 0 || n > len(c.rest) {
		c.rest, c.short = nil, true
		return nil
	}
	out := c.rest[:n:n]
	c.rest = c.rest[n:]
	return out
}

func (c *cursor) u16() uint16 {
	if b := c.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if b := c.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// hexOrEmpty leaves out what was not set.
func hexOrEmpty(b []byte) string {
	if zero(b) {
		return ""
	}
	return hex.EncodeToString(b)
}
