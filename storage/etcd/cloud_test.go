//go:build cloud

package etcd

import (
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/storagetest"
)

// TestARealClusterHoldsTheSuite runs against the cluster that
// KEYAGENT_TEST_ETCD_ENDPOINTS names, with commas between its members, trusted by
// the system's authorities if they are https. It is asked for by the build tag
// cloud, and fails if it then has nothing to run against:
//
//	KEYAGENT_TEST_ETCD_ENDPOINTS=https://a:2379,https://b:2379 go test -tags cloud -run Real ./storage/etcd
func TestARealClusterHoldsTheSuite(t *testing.T) {
	endpoints := os.Getenv("KEYAGENT_TEST_ETCD_ENDPOINTS")
	if endpoints == "" {
		t.Fatal("KEYAGENT_TEST_ETCD_ENDPOINTS is not set (hint: name a cluster that may be written)")
	}
	run := time.Now().UTC().Format("20060102t150405")
	storagetest.Run(t, func(t *testing.T) storagetest.Bed {
		opts := Options{
			Endpoints: strings.Split(endpoints, ","),
			Prefix:    fmt.Sprintf("keyagent-test/%s/%x", run, sha256.Sum256([]byte(t.Name()))),
		}
		if strings.HasPrefix(endpoints, "https:") {
			opts.TLS = &tls.Config{}
		}
		return storagetest.Bed{Open: func() storage.Storage { return open(t, opts) }}
	})
}
