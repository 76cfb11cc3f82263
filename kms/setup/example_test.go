package setup_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/keyagent/keyagent/kms/setup"
)

// A program that runs no key service names a KMS and a storage.
func ExampleDEKs() {
	dir, err := os.MkdirTemp("", "keys")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	master := filepath.Join(dir, "master")
	if err := os.WriteFile(master, []byte("0123456789abcdef0123456789abcdef"), 0o600); err != nil {
		fmt.Println(err)
		return
	}
	ctx := context.Background()
	keys, err := setup.DEKs(ctx, "kms://cluster-kms?file="+master, "storage://no-store")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer keys.Close()
	key, err := keys.GetOrCreate(ctx, "pvc-8f2a", 32)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer key.Close()
	fmt.Println(key, key.Len())
	// Output: [secret] 32
}
