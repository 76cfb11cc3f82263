//go:build cloud

package azureblob

import (
	"crypto/sha256"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/storagetest"
)

// TestARealContainerHoldsTheSuite runs against the container that
// KEYAGENT_TEST_AZURE_CONTAINER names in the account KEYAGENT_TEST_AZURE_ACCOUNT,
// with azidentity's default credentials. It is asked for by the build tag cloud,
// and fails if it then has nothing to run against:
//
//	KEYAGENT_TEST_AZURE_ACCOUNT=a KEYAGENT_TEST_AZURE_CONTAINER=c go test -tags cloud -run Real ./storage/azureblob
func TestARealContainerHoldsTheSuite(t *testing.T) {
	account, container := os.Getenv("KEYAGENT_TEST_AZURE_ACCOUNT"), os.Getenv("KEYAGENT_TEST_AZURE_CONTAINER")
	if account == "" || container == "" {
		t.Fatal("KEYAGENT_TEST_AZURE_ACCOUNT and KEYAGENT_TEST_AZURE_CONTAINER are not both set (hint: name a container that these credentials may write)")
	}
	credential, err := azidentity.NewDefaultAzureCredential(nil)
	if err != nil {
		t.Fatal(err)
	}
	run := time.Now().UTC().Format("20060102t150405")
	storagetest.Run(t, func(t *testing.T) storagetest.Bed {
		prefix := fmt.Sprintf("keyagent-test/%s/%x", run, sha256.Sum256([]byte(t.Name())))
		return storagetest.Bed{Open: func() storage.Storage {
			return open(t, Options{Account: account, Container: container, Prefix: prefix, Credential: credential})
		}}
	})
}
