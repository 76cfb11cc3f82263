package snp_test

import (
	"fmt"
	"os"

	"github.com/keyagent/keyagent/attestation/facts"
	"github.com/keyagent/keyagent/attestation/snp"
)

// A report is read before anything of it is verified.
func ExampleParse() {
	data, err := os.ReadFile("testdata/real/turin-v5.report")
	if err != nil {
		fmt.Println(err)
		return
	}
	r, err := snp.Parse(data)
	if err != nil {
		fmt.Println(err)
		return
	}
	safe, _ := facts.SNPPlatformIOMMUWriteSafe.Of(r.Claims())
	fmt.Println(r.Product, "version", r.Version, "IOMMU writes safe:", safe)
	// Output: Turin version 5 IOMMU writes safe: true
}
