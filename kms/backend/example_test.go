package backend_test

import (
	"fmt"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
)

func Example() {
	kek, err := kms.NewSecret([]byte("0123456789abcdef0123456789abcdef"))
	if err != nil {
		panic(err)
	}
	defer kek.Close()
	key, err := kms.NewSecret([]byte("fedcba9876543210fedcba9876543210"))
	if err != nil {
		panic(err)
	}
	defer key.Close()
	b := kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	blob, err := backend.Seal(kek, b, key)
	if err != nil {
		panic(err)
	}
	again, err := backend.Open(kek, b, blob)
	fmt.Println(again.Equal(key), err)
	again.Close()
	b.VolumeID = "data-2"
	_, err = backend.Open(kek, b, blob)
	fmt.Println(err)
	// Output:
	// true <nil>
	// wrapped key does not open
}
