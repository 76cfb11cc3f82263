//go:build umlguest

package csi

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/keyagent/keyagent/internal/lab/pki"
	"github.com/keyagent/keyagent/test/sim/cluster"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// shield is keyagent in front of a driver: a key service, this node's agent on a software
// TPM, and a proxy for each half of the driver.
type shield struct {
	endpoints
	dir                              string
	service, agent, node, controller *cluster.Process
}

func (s *shield) String() string {
	return "proxy of the node:\n" + s.node.Log.Tail() + "\nof the controller:\n" + s.controller.Log.Tail() + "\nagent:\n" + s.agent.Log.Tail() + "\nkey service:\n" + s.service.Log.Tail()
}

const policy = `version: 1
lifetime: 1h
trust:
  tpm:
    roots: [{name: lab, file: %s}]
profiles:
  - name: node
    tpm:
      trust: ["root:lab"]
      bank: sha256
      event_log: optional
      pcrs: [{pcr: 4, accept: ["f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"]}] # one extension by zeros
grants:
  - {name: csi, profiles: [node], volumes: ["csi-*"], operations: [open, format, clone]}
`

const serviceConfig = `listen: 127.0.0.1:8443
tls: {certificate: server.pem, key: server.key}
policy: policy.yaml
kms: kms://cluster-kms?file=master.secret
storage: storage://file?dir=records
audit: audit.log
admin: %s/admin.sock
`

// The rules are those of docs/csi.md, and for csi-sanity's folders.
const agentConfig = `servers: [{address: "127.0.0.1:8443", ca: ca.pem}]
tpm: {device: "%[1]s", event_log: /nonexistent}
state_dir: %[2]s/state
socket: %[2]s/agent.sock
callers: [{uid: 0, operations: [open, format, close, status, resize], volumes: ["csi-*"]}]
dynamic:
  - uids: [0]
    volumes: ["csi-*"]
    devices: ["/var/lib/kubelet/plugins/kubernetes.io/csi/keyagent/topolvm.io/*/device"]
    mounts: ["/var/lib/kubelet/plugins/kubernetes.io/csi/topolvm.io/*/globalmount", "/var/lib/kubelet/test-*/*"]
    filesystem: ext4
    filesystems: [xfs]
    format: true
`

const proxyConfig = `driver: %s
listen: %s
agent: %s/agent.sock
private: /var/lib/kubelet/plugins/kubernetes.io/csi/keyagent/topolvm.io
prefix: csi-
`

// behind gives a test the shield, and shows what all parts said where the test fails.
func behind(t *testing.T) *shield {
	b, s := start(), shielded()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s\n%s", b, s)
		}
	})
	return s
}

// shielded puts keyagent in front of the driver of this guest.
var shielded = sync.OnceValue(func() *shield {
	t, b := forever{}, start()
	s := &shield{dir: "/run/keyagent-test", endpoints: endpoints{driverDir + "/keyagent.sock", "/run/controller-keyagent.sock"}}
	write := func(name, text string) { check(t, os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600)) }
	check(t, os.MkdirAll(filepath.Join(s.dir, "maker"), 0o755))
	ca := must[*pki.Authority](t)(pki.NewAuthority())
	check(t, ca.Write(s.dir, must[tls.Certificate](t)(ca.Server("127.0.0.1"))))
	maker := must[*swtpm.Authority](t)(swtpm.NewAuthority(filepath.Join(s.dir, "maker")))
	check(t, os.MkdirAll(filepath.Join(s.dir, "tpm"), 0o700))
	check(t, maker.Manufacture(filepath.Join(s.dir, "tpm")))
	must[func()](t)(swtpm.Start(filepath.Join(s.dir, "tpm"), filepath.Join(s.dir, "tpm.sock")))
	device := "unix:" + filepath.Join(s.dir, "tpm.sock")
	check(t, swtpm.Extend(device, 4, make([]byte, 32)))
	write("policy.yaml", fmt.Sprintf(policy, maker.IssuerPath()))
	write("serve.yaml", fmt.Sprintf(serviceConfig, s.dir))
	write("agent.yaml", fmt.Sprintf(agentConfig, device, s.dir))
	write("node.yaml", fmt.Sprintf(proxyConfig, b.endpoints.node, s.endpoints.node, s.dir)+
		"registration: "+kubeletDir+"/plugins_registry/topolvm.io-keyagent-reg.sock\n")
	write("controller.yaml", fmt.Sprintf(proxyConfig, b.endpoints.controller, s.endpoints.controller, s.dir))
	s.service = s.run(t, "serve", "--config", "serve.yaml", "--init-master-secret")
	s.agent = s.contained(t, "agent", "--config", "agent.yaml")
	s.controller = s.run(t, "csi-proxy", "--config", "controller.yaml")
	s.startNode(t)
	for _, socket := range []string{s.endpoints.controller, s.dir + "/agent.sock"} {
		eventually(t, "everything listens", func() bool { return answers(socket) }, s)
	}
	return s
})

// run starts the program in the shield's folder.
func (s *shield) run(t testing.TB, args ...string) *cluster.Process {
	return cluster.Start(t, s.dir, os.Getenv("KEYAGENT_TEST_KEYAGENT"), args...)
}

// contained runs the program as a DaemonSet does, as far as mounts go: with a mount
// namespace of its own, of which the node sees those below kubelet's folder.
func (s *shield) contained(t testing.TB, args ...string) *cluster.Process {
	args = append([]string{"--mount", "--propagation", "unchanged", "/bin/sh", "-c", `mount --make-private / && exec "$0" "$@"`, os.Getenv("KEYAGENT_TEST_KEYAGENT")}, args...)
	return cluster.Start(t, s.dir, "/usr/bin/unshare", args...)
}

func (s *shield) startNode(t testing.TB) {
	s.node = s.contained(forever{t}, "csi-proxy", "--config", "node.yaml")
	eventually(t, "the proxy listens", func() bool { return answers(s.endpoints.node) }, s)
}

func answers(socket string) bool {
	c, err := net.Dial("unix", socket)
	return err == nil && c.Close() == nil
}

// TestProxyLeavesNoPlaintextOnTheDisk: what the search finds without keyagent it does not
// find with it.
func TestProxyLeavesNoPlaintextOnTheDisk(t *testing.T) {
	if volume, image := leaks(t, behind(t).endpoints, "shielded"); volume || image {
		t.Errorf("found in the logical volume: %v, on the disk: %v", volume, image)
	}
}

// TestProxyRestoresSnapshots: of a volume that a pod uses a snapshot is taken, and restored
// beside it; the volume is cloned; both hold what it held, and go their own ways.
func TestProxyRestoresSnapshots(t *testing.T) {
	s := behind(t)
	d := dial(t, s.endpoints)
	for name, capability := range map[string]*csi.VolumeCapability{"xfs": filesystem("xfs"), "block": block()} {
		t.Run(name, func(t *testing.T) {
			file := func(v *volume) string {
				if name == "block" {
					return v.target
				}
				return filepath.Join(v.target, "note")
			}
			write := func(v *volume, text string) {
				t.Helper()
				f := must[*os.File](t)(os.OpenFile(file(v), os.O_RDWR|os.O_CREATE, 0o600))
				_, err := f.WriteAt([]byte(text), 0)
				check(t, errors.Join(err, f.Sync(), f.Close()))
			}
			holds := func(v *volume, want string) {
				t.Helper()
				f := must[*os.File](t)(os.Open(file(v)))
				defer f.Close()
				got := make([]byte, len(want))
				if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, []byte(want)) {
					t.Errorf("%s holds %q, %v, want %q", v.id, got, err, want)
				}
			}
			const size = 400 << 20
			from := create(t, d, name+"-from", size, capability)
			from.publish()
			write(from, "before")
			tool(t, "sync")
			rsp := call(t, d.controller.CreateSnapshot, &csi.CreateSnapshotRequest{Name: name + "-snapshot", SourceVolumeId: from.id})
			snapshot := rsp.GetSnapshot().GetSnapshotId()
			t.Logf("the snapshot is called %s", snapshot)
			t.Cleanup(func() { call(t, d.controller.DeleteSnapshot, &csi.DeleteSnapshotRequest{SnapshotId: snapshot}) })
			write(from, "after ")
			restored := createOf(t, d, name+"-restored", size, capability, &csi.VolumeContentSource{
				Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}})
			cloned := createOf(t, d, name+"-cloned", size+64<<20, capability, &csi.VolumeContentSource{
				Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: from.id}}})
			for v, want := range map[*volume]string{restored: "before", cloned: "after "} {
				v.publish() // while its source is in use
				holds(v, want)
				write(v, "mine  ")
				v.unpublish()
				v.publish()
				holds(v, "mine  ")
				v.unpublish()
			}
			holds(from, "after ")
			from.unpublish()
		})
	}
}

// TestFullSanityThroughTheProxy: all that the driver passes, and what needs staging, which
// it cannot do alone.
func TestFullSanityThroughTheProxy(t *testing.T) {
	s := behind(t)
	if got := sanity(t, s.endpoints); got <= 52 {
		t.Errorf("%d specs passed, want those of the driver alone, 52, and more", got)
	}
}

// TestProxyUnderAKubelet: a real kubelet, with the proxy killed as soon as a filesystem is
// staged, before it is published, and once more while the pod runs.
func TestProxyUnderAKubelet(t *testing.T) {
	b, s := start(), behind(t)
	staged := make(chan struct{})
	go func() {
		defer close(staged)
		for range 3000 {
			if len(mounts(t, "/globalmount")) > 0 {
				s.node.Kill()
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	restarted := make(chan struct{})
	go func() { <-staged; s.startNode(t); close(restarted) }()
	leaked := life(t, b, s.endpoints, "shielded", func(*kubelet, *pod) {
		<-restarted
		s.node.Kill()
		s.startNode(t)
	})
	if leaked {
		t.Error("what the pod wrote is found on the disk")
	}
}
