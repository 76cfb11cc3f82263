package command_test

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/command"
)

// A command prints the key-encryption key, which wraps a new key for each volume.
func ExampleNew() {
	ctx := context.Background()
	k, err := command.New(ctx, command.Options{Command: "printf 0123456789abcdef0123456789abcdef"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer k.Close()
	binding := kms.Binding{VolumeID: "pvc-8f2a", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	key, wrapped, err := k.Generate(ctx, binding)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer key.Close()
	again, err := k.Unwrap(ctx, binding, wrapped)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer again.Close()
	fmt.Println(key, key.Len(), key.Equal(again))
	// Output: [secret] 32 true
}
