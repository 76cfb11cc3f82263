package azure_test

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/kms/azure"
)

// New asks the vault for the key at once. What cannot be right is refused before.
func ExampleNew() {
	_, err := azure.New(context.Background(), azure.Options{VaultName: "disks.vault.azure.net", Key: "kek"})
	fmt.Println(err)
	// Output: the vault must be named: 3 to 24 letters, digits and single dashes, without its domain
}
