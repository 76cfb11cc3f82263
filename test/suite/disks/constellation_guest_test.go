//go:build umlguest

package disks

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	constellation "github.com/keyagent/keyagent/api/constellation/kms"
	"github.com/keyagent/keyagent/csi/cryptmapper"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/cluster"
)

// derived makes the key service's keys those of Constellation.
func (w *world) derived(t *testing.T) {
	t.Helper()
	for name, change := range map[string][2]string{
		"serve.yaml":  {"?file=master.secret", "?file=master.secret&salt=c29tZSBzYWx0&derivation=constellation"},
		"policy.yaml": {"grants:\n", "grants:\n  - {name: disks, profiles: [node], volumes: [\"*-*-*-*-*\"], operations: [open, format]}\n"},
	} {
		text := string(must[[]byte](t)(os.ReadFile(filepath.Join(w.dir, name))))
		if !strings.Contains(text, change[0]) {
			t.Fatalf("%s has no %q", name, change[0])
		}
		w.write(t, name, strings.Replace(text, change[0], change[1], 1))
	}
}

// expected is the key that the cluster KMS derives for a name as Constellation did.
func (w *world) expected(t *testing.T, name string) []byte {
	t.Helper()
	master := must[*kms.Secret](t)(cluster.LoadMasterSecret(filepath.Join(w.dir, "master.secret")))
	defer master.Close()
	k := must[*cluster.KMS](t)(cluster.New(cluster.Options{MasterSecret: master, Salt: []byte("some salt"), Derivation: cluster.Constellation}))
	defer k.Close()
	key, _, err := k.Generate(t.Context(), kms.Binding{VolumeID: name, Purpose: kms.VolumeDEK, Version: 1, Length: 32})
	check(t, err)
	defer key.Close()
	var out []byte
	check(t, key.Use(func(b []byte) error { out = bytes.Clone(b); return nil }))
	return out
}

// withKey runs a tool that reads a key from its standard input.
func withKey(t *testing.T, key []byte, args ...string) {
	t.Helper()
	cmd := exec.Command("cryptsetup", args...)
	cmd.Stdin = bytes.NewReader(key)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cryptsetup %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

func size(t *testing.T, device string) string { return tool(t, "blockdev", "--getsize64", device) }

// TestDiskConstellationsDriversKeepTheirDisks: what a CSI driver of Constellation's does
// with a disk, in its order, with the key that the agent's listener gives for the UUID in
// the disk's header.
func TestDiskConstellationsDriversKeepTheirDisks(t *testing.T) {
	w := newWorld(t)
	w.derived(t)
	n := w.node(t, "constellation")
	n.more = fmt.Sprintf(`constellation: {socket: %s/constellation.sock}
`, n.dir)
	n.callers = `{uid: 0, operations: [get-data-key], volumes: ["*-*-*-*-*"]}`
	n.configure(t)
	a := n.start(t)
	a.waitFor(t, "msg=ready")

	key := func(id string) []byte {
		t.Helper()
		conn := must[*grpc.ClientConn](t)(grpc.NewClient("unix:"+filepath.Join(n.dir, "constellation.sock"), grpc.WithTransportCredentials(insecure.NewCredentials())))
		defer conn.Close()
		resp, err := constellation.NewAPIClient(conn).GetDataKey(t.Context(), &constellation.GetDataKeyRequest{DataKeyId: id, Length: 32})
		check(t, err)
		return resp.GetDataKey()
	}

	// A disk that is new: the driver chooses its UUID, and formats it with the key.
	const uuid, name = "6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11", "ka-test-constellation"
	removed(t, name)
	file := image(t, diskSize)
	device := loop(t, file)
	if got, want := key(uuid), w.expected(t, uuid); !bytes.Equal(got, want) {
		t.Fatal("the key is not the one that Constellation derived")
	}
	withKey(t, key(uuid), "luksFormat", "-q", "--type", "luks2", "--uuid", uuid, "--key-file", "-", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", device)

	// The order of an opening: the header's UUID, the key of that name, the mapping.
	open := func() {
		t.Helper()
		withKey(t, key(tool(t, "cryptsetup", "luksUUID", device)), "open", "--key-file", "-", device, name)
	}
	open()
	overwrite(t, "/dev/mapper/"+name, 0, []byte("written by a driver"))
	tool(t, "cryptsetup", "close", name)
	if bytes.Contains(must[[]byte](t)(os.ReadFile(device)), []byte("written by a driver")) {
		t.Error("it is on the disk in the clear")
	}

	// Another agent, on the same record.
	a.terminate(t)
	a = n.start(t)
	a.waitFor(t, "msg=ready")
	open()
	if got := peek(t, "/dev/mapper/"+name, 0, 19); string(got) != "written by a driver" {
		t.Errorf("it holds %q", got)
	}

	// The disk grows while it is open.
	before := size(t, "/dev/mapper/"+name)
	check(t, os.Truncate(file, 2*diskSize))
	tool(t, "losetup", "-c", device)
	withKey(t, key(tool(t, "cryptsetup", "luksUUID", device)), "resize", "--key-file", "-", name)
	if after := size(t, "/dev/mapper/"+name); after == before || after != fmt.Sprint(2*diskSize-16*mib) {
		t.Errorf("%s bytes became %s", before, after)
	}
	if got := peek(t, "/dev/mapper/"+name, 0, 19); string(got) != "written by a driver" {
		t.Errorf("it holds %q", got)
	}
	tool(t, "cryptsetup", "close", name)

	text := a.log.String()
	if !strings.Contains(text, "local call allowed") || !strings.Contains(text, uuid) {
		t.Errorf("the calls are not in the log: %s", tail(text))
	}
	if secret := fmt.Sprintf("%x", w.expected(t, uuid)); strings.Contains(text, secret) || strings.Contains(w.log.String(), secret) {
		t.Error("the key is in a log")
	}
}

// TestDiskADriverOpensGrowsAndClosesThroughThePackage: the same sequence without a key,
// through the package that drivers link.
func TestDiskADriverOpensGrowsAndClosesThroughThePackage(t *testing.T) {
	n := *first(t)
	n.more = `dynamic: [{uids: [0], volumes: ["v-csi-*"], devices: ["/dev/loop*"], format: true}]
`
	n.configure(t)
	a := n.start(t)
	a.waitFor(t, "msg=ready")
	removed(t, "v-csi-1")
	file := image(t, diskSize)
	device := loop(t, file)

	existing := must[*cryptmapper.CryptMapper](t)(cryptmapper.Dial(filepath.Join(n.dir, "agent.sock"), cryptmapper.Options{}))
	defer existing.Close()
	if path, err := existing.OpenCryptDevice(t.Context(), device, "v-csi-1", false); err == nil {
		t.Fatalf("a volume that does not exist was opened as %s", path)
	}
	m := must[*cryptmapper.CryptMapper](t)(cryptmapper.Dial(filepath.Join(n.dir, "agent.sock"), cryptmapper.Options{Create: true}))
	defer m.Close()
	open := func() {
		t.Helper()
		if path := must[string](t)(m.OpenCryptDevice(t.Context(), device, "v-csi-1", false)); path != "/dev/mapper/v-csi-1" {
			t.Fatalf("it is %s", path)
		}
	}
	open()
	overwrite(t, "/dev/mapper/v-csi-1", 0, []byte("written by a driver"))
	open() // kubelet asks again
	if got := must[string](t)(m.GetDevicePath("/dev/mapper/v-csi-1")); got != device {
		t.Errorf("its device is %q, want %q", got, device)
	}
	before := size(t, "/dev/mapper/v-csi-1")
	check(t, os.Truncate(file, 2*diskSize))
	tool(t, "losetup", "-c", device)
	for range 2 {
		must[string](t)(m.ResizeCryptDevice(t.Context(), "v-csi-1"))
	}
	if after := size(t, "/dev/mapper/v-csi-1"); after == before || after != fmt.Sprint(2*diskSize-16*mib) {
		t.Errorf("%s bytes became %s", before, after)
	}
	for range 2 {
		check(t, m.CloseCryptDevice("v-csi-1"))
	}
	if mapped("v-csi-1") {
		t.Error("it is mapped still")
	}
	open()
	if got := peek(t, "/dev/mapper/v-csi-1", 0, 19); string(got) != "written by a driver" {
		t.Errorf("it holds %q", got)
	}
	check(t, m.CloseCryptDevice("v-csi-1"))
}
