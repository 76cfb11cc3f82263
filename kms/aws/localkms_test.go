package aws

import (
	"testing"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	awscredentials "github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"

	keyagentkms "github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/kmstest"
	"github.com/keyagent/keyagent/test/sim/emulator"
	"github.com/keyagent/keyagent/test/sim/faultproxy"
)

// TestTheSuiteHoldsOnLocalKMS runs against a service that others wrote: it knows
// encryption contexts, but neither recipients nor all of the errors.
func TestTheSuiteHoldsOnLocalKMS(t *testing.T) {
	const region = "eu-west-2"
	front := faultproxy.New(t, emulator.AWSKMS(t))
	creds := awscredentials.NewStaticCredentialsProvider("id", "key", "")
	client := kms.New(kms.Options{Region: region, BaseEndpoint: &front.URL, Credentials: creds})
	open := func(t *testing.T, key string) keyagentkms.KMS {
		t.Helper()
		k, err := New(t.Context(), Options{Key: key, Region: region, Endpoint: front.URL, Credentials: creds})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { k.Close() })
		return k
	}
	var keys [2]string
	for i := range keys {
		out, err := client.CreateKey(t.Context(), &kms.CreateKeyInput{})
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = awssdk.ToString(out.KeyMetadata.Arn)
	}
	kmstest.Run(t, kmstest.Bed{
		Open:  func(t *testing.T) keyagentkms.KMS { return open(t, keys[0]) },
		Other: func(t *testing.T) keyagentkms.KMS { return open(t, keys[1]) },
		Stall: func(*testing.T) func() { return front.Stall() },
	})
}
