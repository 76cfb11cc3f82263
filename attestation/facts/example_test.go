package facts_test

import (
	"fmt"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// A verifier puts a fact, and a policy reads it back as what it was.
func ExampleFact() {
	c := attestation.Claims{Kind: attestation.SNP, Facts: map[string]any{}}
	facts.SNPVMPL.Put(c.Facts, 0)
	vmpl, ok := facts.SNPVMPL.Of(c)
	fmt.Println(vmpl, ok)
	_, ok = facts.SNPProduct.Of(c)
	fmt.Println(ok)
	// Output:
	// 0 true
	// false
}
