//go:build cloud

package awss3

import (
	"crypto/sha256"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/storagetest"
)

// TestARealBucketHoldsTheSuite runs against the bucket that
// KEYAGENT_TEST_S3_BUCKET names, at KEYAGENT_TEST_S3_ENDPOINT if that is set,
// with the credentials and the region of the environment. It is asked for by
// the build tag cloud, and fails if it then has nothing to run against:
//
//	KEYAGENT_TEST_S3_BUCKET=name go test -tags cloud ./storage/awss3
func TestARealBucketHoldsTheSuite(t *testing.T) {
	bucket := os.Getenv("KEYAGENT_TEST_S3_BUCKET")
	if bucket == "" {
		t.Fatal("KEYAGENT_TEST_S3_BUCKET is not set (hint: name a bucket that these credentials may write)")
	}
	run := time.Now().UTC().Format("20060102t150405")
	storagetest.Run(t, func(t *testing.T) storagetest.Bed {
		prefix := fmt.Sprintf("keyagent-test/%s/%x", run, sha256.Sum256([]byte(t.Name())))
		return storagetest.Bed{Open: func() storage.Storage {
			st, err := New(t.Context(), Options{Bucket: bucket, Prefix: prefix, Endpoint: os.Getenv("KEYAGENT_TEST_S3_ENDPOINT")})
			if err != nil {
				t.Fatal(err)
			}
			return st
		}}
	})
}
