package gcp_test

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/gcp"
)

// A key that another backend wrapped is refused before the service is asked.
func ExampleNew() {
	ctx := context.Background()
	k, err := gcp.New(ctx, gcp.Options{
		Project: "my-project", Location: "europe-west3", KeyRing: "disks", Key: "kek",
		Endpoint: "http://127.0.0.1:8085", // left out, it is Google's
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer k.Close()
	binding := kms.Binding{VolumeID: "pvc-8f2a", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	_, err = k.Unwrap(ctx, binding, kms.Wrapped{Scheme: "vault-transit", KEK: "vault:disks", Blob: []byte("…")})
	fmt.Println(err)
	// Output: wrapped key does not open: its scheme is not known here: "vault-transit"
}
