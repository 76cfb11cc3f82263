package saved_test

import (
	"fmt"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/attestation/snp"
)

// A report that another tool saved becomes a file that Verify takes.
func ExampleOf() {
	dir, err := os.MkdirTemp("", "evidence")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	raw, err := os.ReadFile("../snp/testdata/real/milan-v3.report")
	if err != nil {
		fmt.Println(err)
		return
	}
	report, err := snp.Parse(raw)
	if err != nil {
		fmt.Println(err)
		return
	}
	evidence, err := proto.Marshal(&attestv1.SNPEvidence{Report: raw})
	if err != nil {
		fmt.Println(err)
		return
	}
	path := filepath.Join(dir, "evidence.json")
	if err := saved.Write(path, saved.Of(attestation.SNP, evidence, report.ReportData)); err != nil {
		fmt.Println(err)
		return
	}
	s, err := saved.Read(path)
	fmt.Println(saved.Kinds(s), err)
	// Output: [snp] <nil>
}
