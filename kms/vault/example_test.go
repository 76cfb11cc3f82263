package vault_test

import (
	"context"
	"crypto/x509"
	"fmt"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/vault"
)

// A key that another backend wrapped is refused before the server is asked.
func ExampleNew() {
	k, err := vault.New(vault.Options{
		Address: "https://vault.example:8200", Key: "disks",
		RootCAs: x509.NewCertPool(), // of the server: the system's are never used
		Token:   func(context.Context) (*kms.Secret, error) { return kms.NewSecret([]byte("hvs.token")) },
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer k.Close()
	binding := kms.Binding{VolumeID: "pvc-8f2a", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	_, err = k.Unwrap(context.Background(), binding, kms.Wrapped{Scheme: "aws-kms", KEK: "aws:disks", Blob: []byte("…")})
	fmt.Println(err)
	// Output: wrapped key does not open: its scheme is not known here: "aws-kms"
}
