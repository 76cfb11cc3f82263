package attestation_test

import (
	"fmt"
	"time"

	"github.com/keyagent/keyagent/attestation"
)

// What a policy sees is verified claims, all of them bound to the same connection.
func ExampleVerified() {
	v, err := attestation.NewVerified(attestation.Binder{}, time.Now(),
		attestation.Claims{Kind: attestation.SNP, Identity: "chip-7", Trust: "root:amd"},
		attestation.Claims{Kind: attestation.TPM, Identity: "ek-7", Trust: "enrolled:rack-7"})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(v.Identity())
	_, ok := v.Claims(attestation.TDX)
	fmt.Println(ok)
	// Output:
	// snp:chip-7+tpm:ek-7
	// false
}
