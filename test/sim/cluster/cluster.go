// Package cluster runs a real kube-apiserver on a real etcd, and other programs that a
// test starts, looks at and ends.
package cluster

import (
	"cmp"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/keyagent/keyagent/test/sim/emulator"
)

// Options are what a cluster can be made with.
type Options struct {
	Address    string   // what the API server listens at; default 127.0.0.1
	Encryption string   // an EncryptionConfiguration; default none
	Args       []string // further arguments
}

// Cluster is an API server with its etcd. The API server ends and begins again.
type Cluster struct {
	*Client
	Etcd   string   // its URL
	Server *Process // once it is started

	t       testing.TB
	dir     string
	program string
	args    []string
}

// New makes an API server. It is not started.
func New(t testing.TB, o Options) *Cluster {
	t.Helper()
	c := &Cluster{t: t, dir: t.TempDir(), program: emulator.KubeAPIServer(t), Etcd: emulator.Etcd(t)}
	host := cmp.Or(o.Address, "127.0.0.1")
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	_ = l.Close()
	c.Client = Connect("https://" + net.JoinHostPort(host, port))
	c.args = append([]string{
		"--etcd-servers=" + c.Etcd, "--secure-port=" + port, "--bind-address=" + host, "--advertise-address=" + host,
		"--cert-dir=certs", "--service-account-key-file=sa.pub", "--service-account-signing-key-file=sa.key",
		"--service-account-issuer=https://kubernetes.default.svc", "--token-auth-file=tokens.csv", "--authorization-mode=RBAC",
		"--service-cluster-ip-range=10.96.0.0/24", "--disable-admission-plugins=ServiceAccount",
		"--endpoint-reconciler-type=none",
	}, o.Args...)
	c.write("tokens.csv", token+",admin,admin,\"system:masters\"\n")
	if o.Encryption != "" {
		c.args = append(c.args, "--encryption-provider-config="+c.write("encryption.yaml", o.Encryption))
	}
	for _, args := range [][]string{{"genrsa", "-out", "sa.key", "2048"}, {"rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"}} {
		cmd := exec.Command("openssl", args...)
		cmd.Dir = c.dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("openssl: %v: %s", err, out)
		}
	}
	return c
}

func (c *Cluster) write(name, text string) (path string) {
	c.t.Helper()
	path = filepath.Join(c.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return path
}

// Start starts the API server and waits until it is ready.
func (c *Cluster) Start() {
	c.t.Helper()
	c.Server = Start(c.t, c.dir, c.program, c.args...)
	deadline := time.Now().Add(3 * time.Minute)
	for {
		if status, _, err := c.Request(http.MethodGet, "/readyz", ""); err == nil && status == http.StatusOK {
			return
		}
		if c.Server.Ended() || time.Now().After(deadline) {
			c.Server.Kill()
			c.t.Fatalf("the API server is not ready:\n%s", c.Server.Log.Tail())
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// Stop stops the API server.
func (c *Cluster) Stop() { c.Server.Stop(c.t) }
