package certificate_test

import (
	"fmt"

	"github.com/keyagent/keyagent/attestation/certificate"
)

// An NV index of a TPM often holds more than the certificate.
func ExampleUnwrap() {
	nv := []byte{0x30, 0x03, 0x02, 0x01, 0x07, 0x11, 0x11, 0x11, 0x11}
	fmt.Printf("% x\n", certificate.Unwrap(nv))
	// Output: 30 03 02 01 07
}
