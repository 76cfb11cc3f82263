//go:build !umlguest

package csi

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/test/sim/cluster"
	"github.com/keyagent/keyagent/test/sim/emulator"
	"github.com/keyagent/keyagent/test/sim/netns"
	"github.com/keyagent/keyagent/test/sim/uml"
)

// The addresses of the guest's network.
const here, bits, guest = "10.0.2.2", "/24", "10.0.2.15"

// host is where the guest sees the files of this machine, all of them.
const host = "/run/host"

// full says whether to run what shows only that the bed is sound: the same tests
// without keyagent in front of the driver.
var full = os.Getenv("KEYAGENT_CSI_FULL") != ""

// build builds what the guest runs, and returns environment that says where it is.
func build(t *testing.T) []string {
	t.Helper()
	topolvm, definition := emulator.TopoLVM(t)
	emulator.KubeAPIServer(t)
	guest := filepath.Join(t.TempDir(), "csi.test")
	cmd := exec.Command("go", "test", "-c", "-tags", "grpcnotrace,umlguest", "-o", guest, "./test/suite/csi")
	cmd.Dir = "../../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s(hint: make deps installs what it needs)", cmd, err, out)
	}
	program := filepath.Join(t.TempDir(), "keyagent")
	cmd = exec.Command("go", "build", "-trimpath", "-tags", "grpcnotrace,keyagent_noaws,keyagent_noazure,keyagent_nogcp,keyagent_noetcd", "-ldflags", "-s -w", "-o", program, "./cmd/keyagent")
	cmd.Dir = "../../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s(hint: make deps installs what it needs)", cmd, err, out)
	}
	return []string{
		"KEYAGENT_TEST_KEYAGENT=" + program,
		"KEYAGENT_TEST_GUEST=" + guest,
		"KEYAGENT_TEST_DEFINITION=" + definition,
		"KEYAGENT_TEST_TOPOLVM=" + topolvm,
		"KEYAGENT_TEST_SANITY=" + emulator.CSISanity(t),
		"KEYAGENT_TEST_KUBELET=" + emulator.Kubelet(t),
		"KEYAGENT_TEST_RUNTIME=" + emulator.ContainerRuntime(t),
		"KEYAGENT_TEST_REGISTRAR=" + emulator.Registrar(t),
	}
}

// node is what the API server knows of the guest before its kubelet says more.
// topolvm-node wants some annotation to be there.
const node = `apiVersion: v1
kind: Node
metadata:
  name: guest
  annotations: {test: csi}
  labels: {topology.topolvm.io/node: guest}
`

const csiDriver = `apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata: {name: topolvm.io}
spec: {attachRequired: false, podInfoOnMount: true, storageCapacity: false, volumeLifecycleModes: [Persistent]}
`

// storageClass allows claims to grow, which the API server asks of it.
const storageClass = `apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: thin}
provisioner: topolvm.io
parameters: {topolvm.io/device-class: thin}
allowVolumeExpansion: true
`

// TestVolumesOfADriverThatOthersWrote runs the guest's half of the tests. KEYAGENT_TEST_RUN
// names some of them, while one works on these.
func TestVolumesOfADriverThatOthersWrote(t *testing.T) {
	if !netns.Inside() {
		netns.Enter(t, build(t)...)
		return
	}
	began := time.Now()
	netns.Tap(t, "tap0", here+bits)
	c := cluster.New(t, cluster.Options{Address: here})
	c.Start()
	definition, err := os.ReadFile(os.Getenv("KEYAGENT_TEST_DEFINITION"))
	if err != nil {
		t.Fatal(err)
	}
	c.Create(t, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", string(definition))
	c.Create(t, "/apis/storage.k8s.io/v1/csidrivers", csiDriver)
	c.Create(t, "/apis/storage.k8s.io/v1/storageclasses", storageClass)
	c.Create(t, "/api/v1/nodes", node)
	t.Logf("the API server is ready after %v", time.Since(began).Round(100*time.Millisecond))

	match := "^Test(Driver|Proxy)"
	if full {
		match = "^Test(Driver|Proxy|Full)"
	}
	if only := os.Getenv("KEYAGENT_TEST_RUN"); only != "" {
		match = only
	}
	env := []string{"KEYAGENT_TEST_CLUSTER=" + c.URL, "KEYAGENT_TEST_ADDRESS=" + guest + bits}
	for _, name := range []string{"KEYAGENT", "TOPOLVM", "SANITY", "KUBELET", "RUNTIME", "REGISTRAR"} {
		name = "KEYAGENT_TEST_" + name
		env = append(env, name+"="+host+os.Getenv(name))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	var tee io.Writer
	if testing.Verbose() {
		tee = os.Stderr
	}
	result, err := uml.Run(ctx, uml.Guest{
		Tee:     tee,
		Tap:     "tap0",
		Program: "/bin/sh",
		Args: []string{"-c", `set -e
/run/modprobe -a ext4 xfs dm-thin-pool dm-snapshot
mkdir "$0"
mount --bind / "$0"
mount -t tmpfs -o size=90% tmp /tmp
exec "$0$1" -test.v -test.timeout 0 -test.run "$2"`, host, os.Getenv("KEYAGENT_TEST_GUEST"), match},
		Env:    env,
		Memory: 3072,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("guest ran for %v:\n%s", result.Elapsed.Round(100*time.Millisecond), result.Output)
	if result.ExitCode != 0 || !strings.Contains(result.Output, "--- PASS: ") || strings.Contains(result.Output, "no tests to run") {
		t.Fatalf("exit code %d", result.ExitCode)
	}
}
