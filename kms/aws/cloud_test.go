//go:build cloud

package aws

import (
	"os"
	"testing"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/kmstest"
)

// TestARealKeyHoldsTheSuite runs against the keys that KEYAGENT_TEST_AWS_KMS_KEY
// and KEYAGENT_TEST_AWS_KMS_KEY_OTHER name, with the credentials and the region
// of the environment. It is asked for by the build tag cloud, and fails if it then
// has nothing to run against:
//
//	KEYAGENT_TEST_AWS_KMS_KEY=alias/a KEYAGENT_TEST_AWS_KMS_KEY_OTHER=alias/b go test -tags cloud ./kms/aws
func TestARealKeyHoldsTheSuite(t *testing.T) {
	at := func(variable string) func(*testing.T) kms.KMS {
		key := os.Getenv(variable)
		if key == "" {
			t.Fatalf("%s is not set (hint: name a symmetric key that these credentials may use)", variable)
		}
		return func(t *testing.T) kms.KMS { return open(t, Options{Key: key}) }
	}
	kmstest.Run(t, kmstest.Bed{Open: at("KEYAGENT_TEST_AWS_KMS_KEY"), Other: at("KEYAGENT_TEST_AWS_KMS_KEY_OTHER")})
}
