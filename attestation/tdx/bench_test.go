package tdx

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"math/big"
	"testing"
)

// BenchmarkVerifyWarm is a machine that comes back: its chain, its collateral and
// its quoting enclave are known, its quote is new to the verifier each time.
func BenchmarkVerifyWarm(b *testing.B) {
	s := newScene(b)
	v := s.verifier()
	if _, err := verifyWith(v, s.ev); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.VerifyQuote(b.Context(), s.ev, testBinder); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkVerifyCold is a machine that nobody has seen.
func BenchmarkVerifyCold(b *testing.B) {
	s := newScene(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.verifier().VerifyQuote(b.Context(), s.ev, testBinder); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkP256Verify is what no verifier can do without.
func BenchmarkP256Verify(b *testing.B) {
	s := newScene(b)
	q := must[*Quote](b)(Parse(s.ev.Quote))
	key := &s.m.Attestation.Key.PublicKey
	r, sig := new(big.Int).SetBytes(q.signature[:32]), new(big.Int).SetBytes(q.signature[32:])
	digest := sha256.Sum256(q.signed)
	b.ReportAllocs()
	for b.Loop() {
		if !ecdsa.Verify(key, digest[:], r, sig) {
			b.Fatal("does not verify")
		}
	}
}
