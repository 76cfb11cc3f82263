// Package emulator starts the servers that stand in for the clouds' services in
// tests: real programs on a loopback address, each on a port of its own, each
// ending with the test that asked for it. It lives outside every production
// package: no configuration can select it.
//
// The programs are of other projects. Those in Go are built from the modules in
// servers, kubernetes, topolvm and csisanity, none of which is the library's, so that
// nobody inherits what they need; azurite is installed from the lock file in
// servers/azurite. All are kept in the user's cache folder, by a digest of what they
// are made from. etcd is Debian's. A program that cannot be had fails the test: it is
// never skipped.
package emulator

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/keyagent/keyagent/internal/lab/pki"
)

// S3Server is a service that speaks the protocol of Amazon S3.
type S3Server struct {
	URL       string
	AccessKey string
	Secret    string // another one is refused
}

// S3 starts versitygw over a folder.
func S3(t testing.TB) S3Server {
	t.Helper()
	program := build(t, "servers", "versitygw", "-s -w", "github.com/versity/versitygw/cmd/versitygw")
	s := S3Server{AccessKey: "test", Secret: "secret-of-the-test"}
	s.URL = start(t, "http", func(dir string, ports []int) command {
		// Metadata beside the data: not every file system has attributes for it.
		data, sidecar := filepath.Join(dir, "data"), filepath.Join(dir, "sidecar")
		return command{
			path: program, folders: []string{data, sidecar},
			args: []string{"--port", address(ports[0]), "--quiet", "posix", "--sidecar", sidecar, data},
			env:  []string{"ROOT_ACCESS_KEY=" + s.AccessKey, "ROOT_SECRET_KEY=" + s.Secret},
		}
	})
	return s
}

// GCS starts fake-gcs-server in memory and returns its URL. Anyone who asks is
// allowed everything.
func GCS(t testing.TB) string {
	t.Helper()
	program := build(t, "servers", "fake-gcs-server", "-s -w", "github.com/fsouza/fake-gcs-server")
	return start(t, "http", func(_ string, ports []int) command {
		return command{path: program, args: []string{
			"-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", fmt.Sprint(ports[0]),
			"-public-host", address(ports[0]), "-log-level", "warn",
		}}
	})
}

// AzureServer is the blob service of one storage account.
type AzureServer struct {
	URL   string // of the account
	Roots *x509.CertPool
}

// Token returns a bearer token that the server takes. It checks issuer, audience
// and times, and no signature.
func (AzureServer) Token() string {
	part := func(v any) string {
		data, err := json.Marshal(v)
		if err != nil {
			panic(err) // maps of strings and numbers can be encoded
		}
		return base64.RawURLEncoding.EncodeToString(data)
	}
	now := time.Now().Unix()
	return part(map[string]string{"alg": "RS256", "typ": "JWT"}) + "." + part(map[string]any{
		"aud": "https://storage.azure.com", "iss": "https://sts.windows.net/test/", "iat": now - 60, "nbf": now - 60, "exp": now + 3600,
	}) + "." + base64.RawURLEncoding.EncodeToString([]byte("not checked"))
}

// AzureBlob starts azurite in memory, over TLS, because it takes bearer tokens
// in no other way.
func AzureBlob(t testing.TB) AzureServer {
	t.Helper()
	node, script := azurite(t)
	authority := pki.New(t)
	certificate, err := authority.Server("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	keys := t.TempDir()
	if err := authority.Write(keys, certificate); err != nil {
		t.Fatal(err)
	}
	url := start(t, "https", func(_ string, ports []int) command {
		return command{path: node, args: []string{
			script, "--blobHost", "127.0.0.1", "--blobPort", fmt.Sprint(ports[0]),
			"--inMemoryPersistence", "--silent", "--disableTelemetry", "--skipApiVersionCheck", "--oauth", "basic",
			"--cert", filepath.Join(keys, "server.pem"), "--key", filepath.Join(keys, "server.key"),
		}}
	})
	return AzureServer{URL: url + "/devstoreaccount1", Roots: authority.Pool()}
}

// Etcd starts Debian's etcd, alone in its cluster, and returns its URL.
func Etcd(t testing.TB) string {
	t.Helper()
	program := installed(t, "etcd")
	return start(t, "http", func(dir string, ports []int) command {
		client, peer := "http://"+address(ports[0]), "http://"+address(ports[1])
		return command{path: program, health: "/health", args: []string{
			"--name", "test", "--data-dir", filepath.Join(dir, "data"), "--logger", "zap", "--log-level", "warn",
			"--listen-client-urls", client, "--advertise-client-urls", client,
			"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "test=" + peer,
		}}
	})
}

// EtcdCluster starts Debian's etcd as a cluster of n members.
func EtcdCluster(t testing.TB, n int) []*Member {
	t.Helper()
	program := installed(t, "etcd")
	var err error
	for range attempts {
		var members []*Member
		if members, err = etcdMembers(t, program, n); err == nil {
			return members
		}
		for _, m := range members {
			m.Kill()
		}
	}
	t.Fatal(err)
	return nil
}

func etcdMembers(t testing.TB, program string, n int) ([]*Member, error) {
	ports, err := freePorts(2 * n)
	if err != nil {
		return nil, err
	}
	var cluster []string
	for i := range n {
		cluster = append(cluster, fmt.Sprintf("m%d=http://%s", i, address(ports[n+i])))
	}
	members := make([]*Member, n)
	for i := range members {
		client, peer, dir := "http://"+address(ports[i]), "http://"+address(ports[n+i]), t.TempDir()
		members[i] = &Member{URL: client, dir: dir, command: command{path: program, health: "/health", args: []string{
			"--name", fmt.Sprintf("m%d", i), "--data-dir", filepath.Join(dir, "data"), "--logger", "zap", "--log-level", "error",
			"--listen-client-urls", client, "--advertise-client-urls", client,
			"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", strings.Join(cluster, ","),
		}}}
		t.Cleanup(members[i].Kill)
	}
	// None is ready before most are there.
	group := errgroup.Group{}
	for _, m := range members {
		group.Go(m.Start)
	}
	return members, group.Wait()
}

// AWSKMS starts local-kms and returns its URL. Its region is eu-west-2. Anyone who
// asks is allowed everything.
func AWSKMS(t testing.TB) string {
	t.Helper()
	program := build(t, "servers", "localkms", "-s -w", "./localkms", "localkms")
	return start(t, "http", func(dir string, ports []int) command {
		return command{path: program, args: []string{address(ports[0]), filepath.Join(dir, "data")}}
	})
}

func address(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

// environment is what a server inherits: neither credentials of a cloud nor
// what other services are configured with.
func environment() []string {
	return []string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "LC_ALL=C"}
}
