package tdx

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/test/sim/intel"
)

// region is a part of a quote and what its change is refused as.
type region struct {
	name     string
	from, to int
	want     error
}

// regions of a quote, by the sizes that it states.
func regions(q []byte) []region {
	at := 0
	var out []region
	next := func(name string, size int, want error) {
		out = append(out, region{name, at, at + size, want})
		at += size
	}
	next("version", 2, ErrMalformed)
	next("key type", 2, ErrMalformed)
	next("TEE type", 4, ErrMalformed)
	next("reserved", 4, ErrMalformed)
	next("QE vendor", 16, ErrMalformed)
	next("user data", 20, ErrSignature)
	body := 584
	if q[0] == 5 {
		body = int(binary.LittleEndian.Uint32(q[50:]))
		next("body type and size", 6, ErrMalformed)
	}
	next("TD report", body, ErrSignature)
	next("size of signature data", 4, ErrMalformed)
	next("signature", 64, ErrSignature)
	next("attestation key", 64, ErrQE)
	next("certification type and size", 6, ErrMalformed)
	next("QE report", 384, ErrQE)
	next("QE signature", 64, ErrQE)
	auth := int(binary.LittleEndian.Uint16(q[at:]))
	next("size of authentication data", 2, ErrMalformed)
	next("authentication data", auth, ErrQE)
	next("chain type and size", 6, ErrMalformed)
	return out
}

// TestEachBitOfAQuoteCounts: attack 22. A change anywhere is refused, as what
// stands there.
func TestEachBitOfAQuoteCounts(t *testing.T) {
	for _, shape := range shapes {
		s := newScene(t, shape.change)
		// One byte in seven, and the first and last of each region.
		v := s.verifier()
		genuine := s.ev.Quote
		for _, r := range regions(genuine) {
			for i := r.from; i < r.to; i++ {
				if i != r.from && i != r.to-1 && i%7 != 0 {
					continue
				}
				s.ev.Quote = bytes.Clone(genuine)
				s.ev.Quote[i] ^= 1 << (i % 8)
				if _, err := verifyWith(v, s.ev); !errors.Is(err, r.want) {
					t.Errorf("%s: %s, byte %d: %v, want: %v", shape.name, r.name, i, err, r.want)
				}
			}
		}
	}
}

// TestAChangedCertificateIsRefused: the chain is text, and some of its bits mean
// nothing. What verifies has the same certificate.
func TestAChangedCertificateIsRefused(t *testing.T) {
	s := newScene(t)
	genuine := s.ev.Quote
	chain := must[*Quote](t)(Parse(genuine)).chain
	start := len(genuine) - len(chain)
	accepted := 0
	for i := 0; i < len(chain); i += 11 {
		s.ev.Quote = bytes.Clone(genuine)
		s.ev.Quote[start+i] ^= 4
		c, err := s.verify()
		if err == nil {
			// Only the root may differ, which is not used.
			accepted++
			if c.Trust != "root:lab" || i < bytes.LastIndex(chain, []byte("BEGIN")) {
				t.Errorf("byte %d of the chain: %+v", i, c)
			}
		} else if !errors.Is(err, attestation.ErrRefused) {
			t.Errorf("byte %d: %v", i, err)
		}
	}
	t.Logf("%d changes of the carried root were ignored", accepted)
}

func TestAQuoteOfAnotherLengthIsRefused(t *testing.T) {
	s := newScene(t)
	genuine := s.ev.Quote
	for i := range genuine {
		if _, err := Parse(genuine[:i]); !errors.Is(err, ErrMalformed) {
			t.Fatalf("%d bytes of it: %v", i, err)
		}
	}
	for name, c := range map[string]struct {
		quote []byte
		want  error
	}{
		"NULs follow":            {append(bytes.Clone(genuine), make([]byte, 3000)...), nil},
		"something follows":      {append(bytes.Clone(genuine), 0, 0, 1), ErrMalformed},
		"more than there can be": {append(bytes.Clone(genuine), make([]byte, maxQuote)...), ErrMalformed},
		"nothing":                {nil, ErrMalformed},
	} {
		s.ev.Quote = c.quote
		if _, err := s.verify(); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAQuoteOverSomethingElseIsRefused: attacks 18 and 19.
func TestAQuoteOverSomethingElseIsRefused(t *testing.T) {
	s := newScene(t)
	s.fields.Report[63] = 1
	s.quote()
	s.refused(ErrReportData)
	s.fields.Report = [64]byte{}
	s.quote()
	s.refused(ErrReportData)
}

// TestAQuoteOfAnotherKeyIsRefused: attack 22. The quoting enclave of one platform
// does not vouch for the key of another, nor a PCK for another's enclave.
func TestAQuoteOfAnotherKeyIsRefused(t *testing.T) {
	s, other := newScene(t), newScene(t)
	s.m.Attestation.Key = other.m.Attestation.Key
	s.quote() // its own enclave vouches for the other key: this is fine
	s.accepted()

	a, b := must[*Quote](t)(Parse(newScene(t).ev.Quote)), must[*Quote](t)(Parse(newScene(t).ev.Quote))
	p := must[*pck](t)(parsePCK(a.chain))
	v := s.verifier()
	if _, err := v.attestationKey(p, b); !errors.Is(err, ErrQE) {
		t.Errorf("another PCK: %v", err)
	}
	if _, err := v.attestationKey(p, a); err != nil {
		t.Fatal(err)
	}
	if _, err := v.attestationKey(must[*pck](t)(parsePCK(b.chain)), a); !errors.Is(err, ErrQE) {
		t.Errorf("another PCK, while the enclave's report is remembered: %v", err)
	}
	a.attestationKey = b.attestationKey
	if _, err := v.attestationKey(p, a); !errors.Is(err, ErrQE) {
		t.Errorf("another key, while the enclave's report is remembered: %v", err)
	}
}

func TestWhatIsNoEvidenceIsRefused(t *testing.T) {
	v := newScene(t).verifier()
	for _, data := range [][]byte{nil, {0xff}, bytes.Repeat([]byte{0x0a}, 100)} {
		q, err := v.Begin(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := q.Verify(t.Context(), data, testBinder); !errors.Is(err, ErrMalformed) {
			t.Errorf("%x: %v", data, err)
		}
	}
}

// TestUnusualPCKCertificates: what Intel's profile demands and package pcs lets
// pass.
func TestAPCKCertificateWithoutItsExtensionsIsRefused(t *testing.T) {
	s := newScene(t)
	ext := s.m.PCK.Certificate.Extensions[len(s.m.PCK.Certificate.Extensions)-1]
	for name, value := range map[string][]byte{
		"empty":      {0x30, 0},
		"not a list": {4, 0},
		"cut":        ext.Value[:len(ext.Value)/2],
		"too long":   append(bytes.Clone(ext.Value), 5, 0),
		"four that say nothing": {0x30, 0x1c,
			0x30, 5, 6, 1, 0x2a, 2, 0, 0x30, 5, 6, 1, 0x2a, 2, 0, 0x30, 5, 6, 1, 0x2a, 2, 0, 0x30, 5, 6, 1, 0x2a, 2, 0},
	} {
		changed := ext
		changed.Value = value
		leaf := must[intel.Authority](t)(s.w.Issue(pckName, &s.w.Platform, false, changed))
		if _, err := parsePCK(intel.PEM(leaf.Certificate, s.w.Platform.Certificate, s.w.Root.Certificate)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
