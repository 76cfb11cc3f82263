//go:build cloud

package azure

import (
	"os"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/kmstest"
)

// TestARealVaultHoldsTheSuite runs against the keys KEYAGENT_TEST_AZURE_VAULT_KEY and
// KEYAGENT_TEST_AZURE_VAULT_KEY_OTHER of the vault KEYAGENT_TEST_AZURE_VAULT_NAME, which
// is of the type KEYAGENT_TEST_AZURE_VAULT_TYPE, with the credentials of the
// environment. It is asked for by the build tag cloud, and fails if it then has
// nothing to run against.
func TestARealVaultHoldsTheSuite(t *testing.T) {
	must := func(variable string) string {
		value := os.Getenv(variable)
		if value == "" {
			t.Fatalf("%s is not set", variable)
		}
		return value
	}
	c, err := azidentity.NewDefaultAzureCredential(nil)
	if err != nil {
		t.Fatal(err)
	}
	vault, kind := must("KEYAGENT_TEST_AZURE_VAULT_NAME"), must("KEYAGENT_TEST_AZURE_VAULT_TYPE")
	at := func(key string) func(*testing.T) kms.KMS {
		return func(t *testing.T) kms.KMS {
			return open(t, Options{VaultName: vault, VaultType: kind, Key: key, Credential: c})
		}
	}
	kmstest.Run(t, kmstest.Bed{Open: at(must("KEYAGENT_TEST_AZURE_VAULT_KEY")), Other: at(must("KEYAGENT_TEST_AZURE_VAULT_KEY_OTHER"))})
}
