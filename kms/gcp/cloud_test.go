//go:build cloud

package gcp

import (
	"os"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/kmstest"
)

// TestARealKeyHoldsTheSuite runs against the keys that KEYAGENT_TEST_GCP_KMS_KEY
// and KEYAGENT_TEST_GCP_KMS_KEY_OTHER name, each in the form
// projects/P/locations/L/keyRings/R/cryptoKeys/K, with the credentials of the
// environment. It is asked for by the build tag cloud, and fails if it then has
// nothing to run against.
func TestARealKeyHoldsTheSuite(t *testing.T) {
	at := func(variable string) func(*testing.T) kms.KMS {
		p := strings.Split(os.Getenv(variable), "/")
		if len(p) != 8 {
			t.Fatalf("%s is not set to the name of a key (hint: a symmetric key that these credentials may use)", variable)
		}
		return func(t *testing.T) kms.KMS {
			return open(t, Options{Project: p[1], Location: p[3], KeyRing: p[5], Key: p[7]})
		}
	}
	kmstest.Run(t, kmstest.Bed{Open: at("KEYAGENT_TEST_GCP_KMS_KEY"), Other: at("KEYAGENT_TEST_GCP_KMS_KEY_OTHER")})
}
