// Package apiserver runs a real kube-apiserver on the plugin, with a real etcd,
// for tests of what Kubernetes itself makes of it.
package apiserver

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/keyagent/keyagent/test/sim/emulator"
)

const token = "administrator-of-this-test"

// cluster is an API server with its etcd. Its parts end and begin again.
type cluster struct {
	t       testing.TB
	dir     string
	program string
	etcd    string
	port    string
	args    []string
	server  *process
	client  *http.Client
}

// process is a program that a test started.
type process struct {
	cmd  *exec.Cmd
	log  *output
	done chan struct{}
}

// output is what a program prints, read while it prints on.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// Write implements io.Writer.
func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func start(t testing.TB, dir, program string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(program, args...), log: &output{}, done: make(chan struct{})}
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, p.log, p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { defer close(p.done); _ = p.cmd.Wait() }()
	t.Cleanup(p.kill)
	return p
}

// stop ends a program as a service manager does.
func (p *process) stop(t testing.TB) {
	t.Helper()
	_ = p.cmd.Process.Signal(os.Interrupt)
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		t.Errorf("%s does not stop", p.cmd.Path)
		p.kill()
	}
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// newCluster makes an API server that encrypts secrets through the plugin at
// socket, in version "v1" or "v2" of its protocol. It is not started.
func newCluster(t testing.TB, socket, version string) *cluster {
	t.Helper()
	c := &cluster{t: t, dir: t.TempDir(), program: emulator.KubeAPIServer(t), etcd: emulator.Etcd(t)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, c.port, _ = net.SplitHostPort(l.Addr().String())
	_ = l.Close()
	options := ""
	if version == "v1" {
		options = "\n      cachesize: 100"
	}
	for name, text := range map[string]string{
		"tokens.csv": token + ",admin,admin,\"system:masters\"\n",
		"encryption.yaml": fmt.Sprintf(`apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - kms:
      apiVersion: %s
      name: keyagent
      endpoint: unix://%s
      timeout: 3s%s
  - identity: {}
`, version, socket, options),
	} {
		if err := os.WriteFile(filepath.Join(c.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"genrsa", "-out", "sa.key", "2048"}, {"rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"}} {
		cmd := exec.Command("openssl", args...)
		cmd.Dir = c.dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("openssl: %v: %s", err, out)
		}
	}
	c.args = []string{
		"--etcd-servers=" + c.etcd, "--secure-port=" + c.port, "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
		"--cert-dir=certs", "--service-account-key-file=sa.pub", "--service-account-signing-key-file=sa.key",
		"--service-account-issuer=https://kubernetes.default.svc", "--token-auth-file=tokens.csv", "--authorization-mode=RBAC",
		"--service-cluster-ip-range=10.96.0.0/24", "--disable-admission-plugins=ServiceAccount",
		"--encryption-provider-config=encryption.yaml", "--endpoint-reconciler-type=none",
	}
	if version == "v1" {
		c.args = append(c.args, "--feature-gates=KMSv1=true")
	}
	c.client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		// The certificate is one that this server made for itself on loopback.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}}
	return c
}

// start starts the API server and waits until it is ready.
func (c *cluster) start() {
	c.t.Helper()
	c.server = start(c.t, c.dir, c.program, c.args...)
	deadline := time.Now().Add(3 * time.Minute)
	for {
		if status, _, err := c.request(http.MethodGet, "/readyz", ""); err == nil && status == http.StatusOK {
			return
		}
		if c.server.ended() || time.Now().After(deadline) {
			c.server.kill()
			c.t.Fatalf("the API server is not ready:\n%s", tail(c.server.log.String()))
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (c *cluster) stop() { c.server.stop(c.t) }

func (c *cluster) request(method, path, body string) (int, []byte, error) {
	r, err := http.NewRequest(method, "https://127.0.0.1:"+c.port+path, strings.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("Content-Type", "application/json")
	rsp, err := c.client.Do(r)
	if err != nil {
		return 0, nil, err
	}
	defer rsp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(rsp.Body, 1<<20))
	return rsp.StatusCode, data, err
}

const secrets = "/api/v1/namespaces/default/secrets"

// write creates a secret.
func (c *cluster) write(name, value string) error {
	body := fmt.Sprintf(`{"apiVersion":"v1","kind":"Secret","metadata":{"name":%q},"data":{"value":%q}}`, name, base64.StdEncoding.EncodeToString([]byte(value)))
	status, data, err := c.request(http.MethodPost, secrets, body)
	if err == nil && status != http.StatusCreated {
		err = fmt.Errorf("%d: %s", status, data)
	}
	return err
}

// read reads a secret.
func (c *cluster) read(name string) (string, error) {
	status, data, err := c.request(http.MethodGet, secrets+"/"+name, "")
	if err != nil {
		return "", err
	}
	if status != http.StatusOK {
		return "", fmt.Errorf("%d: %s", status, data)
	}
	var s struct {
		Data struct{ Value []byte }
	}
	err = json.Unmarshal(data, &s)
	return string(s.Data.Value), err
}

// stored is what etcd holds of a secret.
func (c *cluster) stored(name string) []byte {
	c.t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{c.etcd}, DialTimeout: 10 * time.Second})
	if err != nil {
		c.t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	rsp, err := client.Get(ctx, "/registry/secrets/default/"+name)
	if err == nil && len(rsp.Kvs) != 1 {
		err = errors.New("not there")
	}
	if err != nil {
		c.t.Fatalf("%s in etcd: %v", name, err)
	}
	return rsp.Kvs[0].Value
}

func tail(s string) string { return s[max(0, len(s)-4000):] }
