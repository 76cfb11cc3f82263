package azureblob_test

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/storage/azureblob"
)

// New looks for the container at once. What cannot be right is refused before.
func ExampleNew() {
	_, err := azureblob.New(context.Background(), azureblob.Options{Account: "disks", Container: "records"})
	fmt.Println(err)
	// Output: a credential is needed
}
