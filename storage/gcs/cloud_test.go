//go:build cloud

package gcs

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
// KEYAGENT_TEST_GCS_BUCKET names, with the SDK's default credentials. It is asked
// for by the build tag cloud, and fails if it then has nothing to run against:
//
//	KEYAGENT_TEST_GCS_BUCKET=name go test -tags cloud -run Real ./storage/gcs
func TestARealBucketHoldsTheSuite(t *testing.T) {
	bucket := os.Getenv("KEYAGENT_TEST_GCS_BUCKET")
	if bucket == "" {
		t.Fatal("KEYAGENT_TEST_GCS_BUCKET is not set (hint: name a bucket that these credentials may write)")
	}
	run := time.Now().UTC().Format("20060102t150405")
	storagetest.Run(t, func(t *testing.T) storagetest.Bed {
		prefix := fmt.Sprintf("keyagent-test/%s/%x", run, sha256.Sum256([]byte(t.Name())))
		return storagetest.Bed{Open: func() storage.Storage { return open(t, Options{Bucket: bucket, Prefix: prefix}) }}
	})
}
