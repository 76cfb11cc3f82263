package snp_test

import (
	"crypto/ecdsa"
	"crypto/sha512"
	"testing"

	"github.com/google/go-sev-guest/abi"
	"google.golang.org/protobuf/proto"

	"github.com/keyagent/keyagent/test/sim/amd"
)

func BenchmarkVerifyWarm(b *testing.B) {
	chip := newChip(b, "Milan")
	v := lab(b, chip.Authority)
	data := must[[]byte](b)(proto.Marshal(must[*evidence](b)(chip.Evidence(amd.Report{Data: testBinder}))))
	run := func() {
		q, err := v.Begin(b.Context(), nil)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := q.Verify(b.Context(), data, testBinder); err != nil {
			b.Fatal(err)
		}
	}
	run()
	b.ReportAllocs()
	for b.Loop() {
		run()
	}
}

func BenchmarkVerifyCold(b *testing.B) {
	chip := newChip(b, "Milan")
	ev := must[*evidence](b)(chip.Evidence(amd.Report{Data: testBinder}))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := verify(b.Context(), lab(b, chip.Authority), ev); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkP384Verify is the one signature that no verification can do without.
func BenchmarkP384Verify(b *testing.B) {
	chip := newChip(b, "Milan")
	report := must[[]byte](b)(chip.Sign(amd.Report{Data: testBinder}))
	signature := must[[]byte](b)(abi.ReportToSignatureDER(report))
	key := chip.VCEK.PublicKey.(*ecdsa.PublicKey)
	b.ReportAllocs()
	for b.Loop() {
		digest := sha512.Sum384(abi.SignedComponent(report))
		if !ecdsa.VerifyASN1(key, digest[:], signature) {
			b.Fatal("refused")
		}
	}
}
