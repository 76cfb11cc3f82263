package nitro_test

import (
	"context"
	"fmt"
	"os"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/nitro"
)

// The same root signs documents of Nitro enclaves. They are no evidence of an instance.
func ExampleVerifier() {
	document, err := os.ReadFile("testdata/enclave.cose")
	if err != nil {
		fmt.Println(err)
		return
	}
	v, err := nitro.NewVerifier(nitro.VerifierOptions{
		Trust: func() nitro.Trust { return nitro.Trust{Roots: nitro.AWS()} },
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	q, err := v.Begin(context.Background(), nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	evidence, err := proto.Marshal(&attestv1.NitroEvidence{Document: document})
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = q.Verify(context.Background(), evidence, attestation.Binder{})
	fmt.Println(err)
	// Output: evidence refused: document is not of a NitroTPM: module "i-0918f6c55e3b61d89-enc018aa8b8e2285d13"
}
