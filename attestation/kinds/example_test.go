package kinds_test

import (
	"fmt"
	"strings"

	"github.com/keyagent/keyagent/attestation/kinds"
)

// All kinds stand in one table, the strongest first.
func ExampleAll() {
	fmt.Println(strings.Join(kinds.All().Names(), ", "))
	list, err := kinds.All().Parse([]string{"snp", "tpm"})
	fmt.Println(list, err)
	// Output:
	// azure, svsm, snp, tdx, nitro, tpm
	// [snp tpm] <nil>
}
