package uki_test

import (
	"fmt"

	"github.com/keyagent/keyagent/attestation/tpm/uki"
)

// PCR 11 is known before the image was ever started.
func ExampleImage_PCR11() {
	img, err := uki.Parse(uki.SmallUKI()) // programs call Open with a path
	if err != nil {
		fmt.Println(err)
		return
	}
	all, err := img.PCR11(0) // of the first profile
	if err != nil {
		fmt.Println(err)
		return
	}
	p := all[0]
	p.Words("enter-initrd", "leave-initrd") // which systemd measures later
	fmt.Printf("%.4x… after %d events, command line %q\n", p.Value, len(p.Events), img.CommandLine(0))
	// Output: 3a13c0ce… after 10 events, command line "quiet"
}
