package svsm_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/svsm"
)

// A verifier is made of one for the report and the PCRs that the vTPM has to quote.
func ExampleNewVerifier() {
	report, err := snp.NewVerifier(snp.VerifierOptions{
		Trust: func() snp.Trust { return snp.Trust{Roots: snp.AMD()} },
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	v, err := svsm.NewVerifier(report, func() []uint32 { return []uint32{4, 7, 11} })
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = v.Begin(context.Background(), []byte("not an offer"))
	fmt.Println(v.Kind(), errors.Is(err, attestation.ErrRefused))
	// Output: svsm true
}
