package tdx_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"os"
	"time"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation/facts"
	"github.com/keyagent/keyagent/attestation/tdx"
)

// A quote of a made-up machine verifies against a made-up root. Programs trust Intel.
func ExampleVerifier_VerifyQuote() {
	raw, err := os.ReadFile("testdata/evidence-v4.bin")
	if err != nil {
		fmt.Println(err)
		return
	}
	der, err := os.ReadFile("testdata/root.der")
	if err != nil {
		fmt.Println(err)
		return
	}
	evidence := &attestv1.TDXEvidence{}
	if err := proto.Unmarshal(raw, evidence); err != nil {
		fmt.Println(err)
		return
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		fmt.Println(err)
		return
	}
	quote, err := tdx.Parse(evidence.GetQuote())
	if err != nil {
		fmt.Println(err)
		return
	}
	v, err := tdx.NewVerifier(tdx.VerifierOptions{
		Trust: func() tdx.Trust { return tdx.Trust{Roots: []tdx.Root{{Name: "lab", Certificate: root}}} },
		Now:   func() time.Time { return root.NotBefore.Add(2 * time.Hour) },
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	claims, err := v.VerifyQuote(context.Background(), evidence, quote.ReportData)
	if err != nil {
		fmt.Println(err)
		return
	}
	status, _ := facts.TDXTCBStatus.Of(claims)
	fmt.Println(claims.Trust, status)
	// Output: root:lab UpToDate
}
