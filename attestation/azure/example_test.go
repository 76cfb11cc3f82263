package azure_test

import (
	"fmt"
	"os"

	"github.com/keyagent/keyagent/attestation/azure"
)

// A report of the host compatibility layer is read before anything of it is verified.
func ExampleSummarize() {
	report, err := os.ReadFile("testdata/hcl-report-snp.bin")
	if err != nil {
		fmt.Println(err)
		return
	}
	s, err := azure.Summarize(report)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(s.Isolation, "HCL", s.HCL, "secure boot", s.SecureBoot)
	// Output: snp HCL 1 secure boot true
}
