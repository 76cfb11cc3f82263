package apiserver

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyagent/keyagent/test/sim/cluster"
)

// program is the keyagent under test, built as it is released.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "keyagent-kubernetes-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "keyagent")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "./cmd/keyagent")
	cmd.Dir = "../../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

// plugin is keyagent kubekms with a KEK that a command prints.
type plugin struct {
	t      *testing.T
	dir    string
	socket string
	p      *cluster.Process
}

func newPlugin(t *testing.T) *plugin {
	t.Helper()
	// A socket's path is at most 107 bytes; t.TempDir can be longer.
	dir, err := os.MkdirTemp("", "kubekms")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &plugin{t: t, dir: dir, socket: filepath.Join(dir, "kms.sock")}
}

// kek gives the command another KEK to print.
func (p *plugin) kek() {
	p.t.Helper()
	key := make([]byte, 32)
	rand.Read(key)
	next := filepath.Join(p.dir, "next")
	if err := os.WriteFile(next, key, 0o600); err != nil {
		p.t.Fatal(err)
	}
	if err := os.Rename(next, filepath.Join(p.dir, "kek")); err != nil {
		p.t.Fatal(err)
	}
}

func (p *plugin) start(args ...string) {
	p.t.Helper()
	path, err := program()
	if err != nil {
		p.t.Fatal(err)
	}
	p.p = cluster.Start(p.t, p.dir, path, append([]string{"kubekms", "--command", "cat kek", "--endpoint", "unix://" + p.socket, "--timeout", "1m"}, args...)...)
	deadline := time.Now().Add(30 * time.Second)
	for {
		if c, err := net.Dial("unix", p.socket); err == nil {
			c.Close()
			return
		}
		if p.p.Ended() || time.Now().After(deadline) {
			p.p.Kill()
			p.t.Fatalf("the plugin does not serve:\n%s", p.p.Log.String())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (p *plugin) stop() { p.p.Stop(p.t) }

// both is a plugin and a cluster on it that are ready.
func both(t *testing.T, version string, args ...string) (*plugin, *encrypting) {
	t.Helper()
	p := newPlugin(t)
	p.kek()
	p.start(args...)
	c := newCluster(t, p.socket, version)
	c.Start()
	return p, c
}

const value = "a secret that stands in no database"

func (c *encrypting) reads(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if got, err := c.read(name); err != nil || got != value {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// encrypted wants ciphertext of the plugin's in etcd.
func (c *encrypting) encrypted(t *testing.T, name, version string) []byte {
	t.Helper()
	data := c.stored(name)
	if !bytes.HasPrefix(data, []byte("k8s:enc:kms:"+version+":keyagent:")) || bytes.Contains(data, []byte(value)) {
		t.Errorf("%s stands in etcd as %.60q", name, data)
	}
	return data
}

// A real API server writes ciphertext, reads it again, and both sides may be
// restarted in any order, in both versions of the protocol.
func TestARealAPIServerKeepsSecretsThroughThePlugin(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"v2", "v1"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			p, c := both(t, version)
			write := func(name string) {
				t.Helper()
				if err := c.write(name, value); err != nil {
					t.Fatalf("%v\nthe plugin said:\n%s", err, p.p.Log.Tail())
				}
			}
			write("first")
			c.encrypted(t, "first", version)
			c.reads(t, "first")
			if version == "v2" {
				c.manifests(t)
			}

			p.stop()
			p.start()
			write("after-plugin")
			c.reads(t, "first", "after-plugin")

			c.Stop()
			c.Start()
			write("after-server")
			c.reads(t, "first", "after-plugin", "after-server")

			c.Stop()
			p.stop()
			p.start()
			c.Start()
			c.reads(t, "first", "after-plugin", "after-server")

			if log := p.p.Log.String(); strings.Contains(log, value) {
				t.Error("the plugin's log has plaintext")
			}
			p.stop()
			if _, err := os.Stat(p.socket); err == nil {
				t.Error("a plugin that ends leaves its socket")
			}
		})
	}
}

// A KEK that changes under a write load loses no request, and what was written
// before it decrypts.
func TestAKEKChangesUnderLoad(t *testing.T) {
	t.Parallel()
	p, c := both(t, "v2")
	if err := c.write("old", value); err != nil {
		t.Fatal(err)
	}
	before := keyID(c.encrypted(t, "old", "v2"))
	p.kek()
	// A fetch each fifth of the minute, two that agree, and the API server's own
	// look at the plugin each minute.
	deadline := time.Now().Add(4 * time.Minute)
	var names []string
	for n := 0; ; n++ {
		name := fmt.Sprintf("load-%d", n)
		if err := c.write(name, value); err != nil {
			t.Fatalf("request %d is lost: %v\nthe plugin said:\n%s", n, err, p.p.Log.Tail())
		}
		names = append(names, name)
		if keyID(c.encrypted(t, name, "v2")) != before {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %d writes the API server still uses the old KEK:\n%s", n, p.p.Log.Tail())
		}
		time.Sleep(250 * time.Millisecond)
	}
	t.Logf("%d writes", len(names))
	c.reads(t, append(names, "old")...)
	c.Stop()
	c.Start()
	c.reads(t, names[0], names[len(names)-1], "old")
}

// keyID is the part of a stored object that names the KEK: it stands in plain in
// the message that the API server wraps the ciphertext in.
func keyID(stored []byte) string {
	rest := stored[bytes.Index(stored, []byte("keyagent:"))+len("keyagent:"):]
	// EncryptedObject of k8s.io/apiserver: field 1 is the data, field 2 the key ID.
	for len(rest) > 2 {
		tag := rest[0]
		size, n := uvarint(rest[1:])
		if n == 0 || uint64(len(rest)) < 1+uint64(n)+size {
			return ""
		}
		body := rest[1+n : 1+uint64(n)+size]
		if tag == 2<<3|2 {
			return string(body)
		}
		rest = rest[1+uint64(n)+size:]
	}
	return ""
}

func uvarint(b []byte) (v uint64, n int) {
	for n < len(b) && n < 10 {
		v |= uint64(b[n]&0x7f) << (7 * n)
		n++
		if b[n-1] < 0x80 {
			return v, n
		}
	}
	return 0, 0
}

// A source that fails is an outage that each setting answers in its own way: after
// five failures "fail" has no KEK any more, and "coast" goes on and says that it is
// not healthy. Either way what the API server has in memory still serves, and all
// is well once the source answers.
func TestAnOutageOfTheSourceEnds(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{"fail": {"--outage", "fail"}, "coast": {"--outage", "coast", "--coast-for", "10m"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, c := both(t, "v2", args...)
			if err := c.write("before", value); err != nil {
				t.Fatal(err)
			}
			hidden := filepath.Join(p.dir, "hidden")
			if err := os.Rename(filepath.Join(p.dir, "kek"), hidden); err != nil {
				t.Fatal(err)
			}
			unhealthy := false
			for deadline := time.Now().Add(4 * time.Minute); !unhealthy && time.Now().Before(deadline); time.Sleep(time.Second) {
				status, body, err := c.Request("GET", "/readyz?verbose", "")
				unhealthy = err == nil && status != 200 && strings.Contains(string(body), "[-]kms")
			}
			if !unhealthy {
				t.Errorf("the API server takes the plugin for healthy:\n%s", p.p.Log.Tail())
			}
			if err := c.write("during", value); err != nil {
				t.Errorf("while the source is away: %v", err)
			}
			c.reads(t, "before", "during")
			if err := os.Rename(hidden, filepath.Join(p.dir, "kek")); err != nil {
				t.Fatal(err)
			}
			healthy := false
			for deadline := time.Now().Add(2 * time.Minute); !healthy && time.Now().Before(deadline); time.Sleep(time.Second) {
				status, _, err := c.Request("GET", "/readyz", "")
				healthy = err == nil && status == 200
			}
			if !healthy {
				t.Error("the API server does not take the plugin back")
			}
			c.Stop()
			c.Start()
			c.reads(t, "before", "during")
		})
	}
}
