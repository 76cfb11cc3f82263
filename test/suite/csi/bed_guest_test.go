//go:build umlguest

package csi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/keyagent/keyagent/test/sim/cluster"
)

// These run inside a guest, which csi_test.go boots.

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		check(t, err)
		return v
	}
}

// tool runs a program of the system.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// forever is a testing.TB for what lives as long as the guest does.
type forever struct{ testing.TB }

func (forever) Helper()                      {}
func (forever) Cleanup(func())               {}
func (forever) Logf(string, ...any)          {}
func (forever) Fatal(args ...any)            { panic(fmt.Sprint(args...)) }
func (forever) Fatalf(f string, args ...any) { panic(fmt.Sprintf(f, args...)) }

// patience is longer than anything here takes on a machine with other work to do.
const patience = 6 * time.Minute

// eventually waits for what becomes true, and fails with what said is otherwise.
func eventually(t testing.TB, what string, is func() bool, said ...fmt.Stringer) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after %v still not: %s\n%s", patience, what, said)
		}
	}
}

// The driver's name, and the disk that its volumes lie on.
const (
	driverName = "topolvm.io"
	disk       = "/run/disk.img"
	group      = "group"
)

// Where a kubelet keeps volumes, and finds drivers.
const (
	kubeletDir = "/var/lib/kubelet"
	driverDir  = kubeletDir + "/plugins/topolvm.io/node"
)

// thin are the parameters of a StorageClass whose volumes come from the thin pool, the
// only ones that have snapshots.
var thin = map[string]string{"topolvm.io/device-class": "thin"}

// endpoints are the sockets of a driver's two halves, or of what stands before them.
type endpoints struct{ node, controller string }

// bed is a driver that serves, and the cluster that it belongs to.
type bed struct {
	endpoints
	*cluster.Client
	kubeconfig       string
	node, controller *cluster.Process
}

func (b *bed) String() string {
	return "topolvm-node:\n" + b.node.Log.Tail() + "\ntopolvm-controller:\n" + b.controller.Log.Tail()
}

// start makes network, disk and driver, which all tests of a guest share.
var start = sync.OnceValue(func() *bed {
	t, began := forever{}, time.Now()
	network(t)
	logicalVolumes(t)
	for _, dir := range []string{"/var/lib", "/var/log"} {
		tool(t, "mount", "-t", "tmpfs", "none", dir)
	}
	check(t, os.MkdirAll(driverDir, 0o755))
	// What is mounted below is seen by all.
	tool(t, "mount", "--bind", kubeletDir, kubeletDir)
	tool(t, "mount", "--make-rshared", kubeletDir)

	b := &bed{
		Client:     cluster.Connect(os.Getenv("KEYAGENT_TEST_CLUSTER")),
		endpoints:  endpoints{driverDir + "/csi.sock", "/run/controller.sock"},
		kubeconfig: "/run/kubeconfig",
	}
	check(t, os.WriteFile(b.kubeconfig, []byte(b.Kubeconfig()), 0o600))
	check(t, os.Setenv("KUBECONFIG", b.kubeconfig))
	check(t, os.WriteFile("/run/lvmd.yaml", []byte(`device-classes:
- {name: thick, volume-group: `+group+`, spare-gb: 0, default: true}
- {name: thin, volume-group: `+group+`, spare-gb: 0, type: thin, thin-pool: {name: pool, overprovision-ratio: 5.0}}
lvm-command-prefix: ["/usr/sbin/lvm"]
`), 0o600))
	program := os.Getenv("KEYAGENT_TEST_TOPOLVM")
	b.node = cluster.Start(t, "/run", program, "topolvm-node", "--nodename", "guest", "--embed-lvmd", "--config", "/run/lvmd.yaml",
		"--csi-socket", b.endpoints.node, "--metrics-bind-address", "0")
	b.controller = cluster.Start(t, "/run", program, "topolvm-controller", "--csi-socket", b.endpoints.controller,
		"--metrics-bind-address", "0", "--health-probe-bind-address", "0", "--enable-webhooks=false", "--leader-election=false",
		"--webhook-addr", "127.0.0.1:9443")
	eventually(t, "the driver listens", func() bool {
		_, err := os.Stat(b.endpoints.node)
		_, also := os.Stat(b.endpoints.controller)
		return errors.Join(err, also) == nil
	}, b)
	d := dial(t, b.endpoints)
	eventually(t, "the driver knows of its capacity", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		rsp, err := d.controller.GetCapacity(ctx, &csi.GetCapacityRequest{Parameters: thin})
		return err == nil && rsp.AvailableCapacity > 0
	}, b)
	fmt.Println("the driver is ready after", time.Since(began).Round(100*time.Millisecond))
	return b
})

func network(t testing.TB) {
	for _, args := range []string{"link set lo up", "link set vec0 up", "addr add " + os.Getenv("KEYAGENT_TEST_ADDRESS") + " dev vec0"} {
		tool(t, "ip", strings.Fields(args)...)
	}
}

// lvmConfig is for a machine without udev, on which LVM makes the nodes of devices
// itself, and for a kernel on which pages are dear: LVM otherwise locks and touches
// megabytes of memory at each change, and starts a daemon that watches the pool.
const lvmConfig = `activation {
	udev_sync = 0
	udev_rules = 0
	monitoring = 0
	use_mlockall = 0
	reserved_memory = 0
	reserved_stack = 0
}
backup {
	backup = 0
	archive = 0
}
devices {
	obtain_device_list_from_udev = 0
	use_devicesfile = 0
	filter = ["a|^/dev/loop0$|", "r|.*|"]
}
`

// logicalVolumes makes a disk with a group of volumes and a thin pool.
func logicalVolumes(t testing.TB) {
	const config = "/run/lvm-config"
	check(t, os.MkdirAll(config, 0o755))
	for _, dir := range []string{"/run/lock", "/run/lvm"} {
		check(t, os.MkdirAll(dir, 0o755))
	}
	check(t, os.WriteFile(config+"/lvm.conf", []byte(lvmConfig), 0o600))
	check(t, os.Setenv("LVM_SYSTEM_DIR", config))
	check(t, os.Setenv("DM_DISABLE_UDEV", "1"))
	f := must[*os.File](t)(os.Create(disk))
	check(t, f.Truncate(1500<<20))
	check(t, f.Close())
	loop := tool(t, "losetup", "-f", "--show", disk)
	tool(t, "lvm", "vgcreate", "-q", group, loop)
	tool(t, "lvm", "lvcreate", "-q", "-T", "-L", "700M", group+"/pool")
}

// driver asks a driver, or what stands before it.
type driver struct {
	node       csi.NodeClient
	controller csi.ControllerClient
	stages     bool // NodeStageVolume comes before NodePublishVolume
}

func dial(t testing.TB, e endpoints) *driver {
	t.Helper()
	connect := func(socket string) *grpc.ClientConn {
		c := must[*grpc.ClientConn](t)(grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials())))
		t.Cleanup(func() { c.Close() })
		return c
	}
	d := &driver{node: csi.NewNodeClient(connect(e.node)), controller: csi.NewControllerClient(connect(e.controller))}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	rsp := must[*csi.NodeGetCapabilitiesResponse](t)(d.node.NodeGetCapabilities(ctx, &csi.NodeGetCapabilitiesRequest{}, grpc.WaitForReady(true)))
	for _, c := range rsp.Capabilities {
		d.stages = d.stages || c.GetRpc().GetType() == csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME
	}
	return d
}

// sanity runs csi-sanity, and returns how many of its specs passed.
func sanity(t *testing.T, e endpoints, args ...string) int {
	t.Helper()
	dir := place(t)
	parameters := filepath.Join(dir, "parameters.yaml")
	var text strings.Builder
	for k, v := range thin {
		fmt.Fprintf(&text, "%s: %s\n", k, v)
	}
	check(t, os.WriteFile(parameters, []byte(text.String()), 0o600))
	began := time.Now()
	var out bytes.Buffer
	cmd := exec.Command(os.Getenv("KEYAGENT_TEST_SANITY"), append([]string{
		"-ginkgo.no-color", "-ginkgo.timeout", "15m",
		"-csi.endpoint", e.node, "-csi.controllerendpoint", e.controller,
		"-csi.mountdir", filepath.Join(dir, "mount"), "-csi.stagingdir", filepath.Join(dir, "stage"),
		"-csi.testvolumesize", fmt.Sprint(64 << 20), "-csi.testvolumeexpandsize", fmt.Sprint(128 << 20),
		"-csi.testvolumeparameters", parameters,
	}, args...)...)
	cmd.Stdout = io.MultiWriter(&out, os.Stdout) // a point for each spec: it takes minutes
	cmd.Stderr = cmd.Stdout
	err := cmd.Run()
	summary := regexp.MustCompile(`(\d+) Passed \| (\d+) Failed \| \d+ Pending \| (\d+) Skipped`).FindStringSubmatch(out.String())
	if err != nil || summary == nil || summary[2] != "0" {
		t.Fatalf("csi-sanity: %v\n%s", err, &out)
	}
	t.Logf("csi-sanity took %v: %s", time.Since(began).Round(100*time.Millisecond), summary[0])
	var passed int
	fmt.Sscan(summary[1], &passed)
	return passed
}
