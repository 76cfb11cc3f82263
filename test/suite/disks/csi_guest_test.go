//go:build umlguest

package disks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/keyagent/keyagent/test/sim/csidriver"
	"github.com/keyagent/keyagent/test/sim/seed"
)

// storage is what both nodes' drivers attach: images, by handle.
type storage struct {
	mu     sync.Mutex
	images map[string]string
}

func (s *storage) image(handle string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.images[handle]
}

// plugin is a node with a CSI driver, the proxy in front of it, and a caller in place of
// kubelet.
type plugin struct {
	*machine
	t       *testing.T
	agent   *agent
	proxy   *agent
	driver  *csidriver.Driver
	storage *storage
	kubelet string
	lie     string // a device to attach in place of the right one
	node    csi.NodeClient
}

// newPlugin starts a driver, the agent and the proxy on a node. The driver publishes as
// some of the field do: each time on top of what is there.
func newPlugin(t *testing.T, n *machine, s *storage, more ...string) *plugin {
	t.Helper()
	m := *n
	m.patient = len(more) > 0 // see patient
	p := &plugin{machine: &m, t: t, storage: s, kubelet: filepath.Join(t.TempDir(), "kubelet"), driver: &csidriver.Driver{Name: "disks.example"}}
	check(t, os.MkdirAll(p.kubelet, 0o755))
	p.driver.Can = []csi.NodeServiceCapability_RPC_Type{csi.NodeServiceCapability_RPC_EXPAND_VOLUME}
	p.driver.Publish, p.driver.Unpublish, p.driver.Expand = p.attach, p.detach, p.grow
	l := must[net.Listener](t)(net.Listen("unix", filepath.Join(p.kubelet, "driver.sock")))
	server := p.driver.Server()
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	m.more = fmt.Sprintf(`dynamic: [{uids: [0], volumes: ["v-csi-*"], devices: ["%[1]s/raw/*/device"], mounts: ["%[1]s/stage-*"], filesystems: [ext4, xfs, btrfs], format: true, no_journal: true}]`, p.kubelet)
	m.configure(t)
	check(t, os.WriteFile(filepath.Join(p.kubelet, "csi.yaml"), []byte(fmt.Sprintf(`driver: %[1]s/driver.sock
listen: %[1]s/csi.sock
registration: %[1]s/registration.sock
agent: %[2]s/agent.sock
private: %[1]s/raw
kubelet: %[1]s
prefix: v-csi-
`, p.kubelet, m.dir)+strings.Join(more, "\n")), 0o600))
	t.Cleanup(p.clean)
	p.startAgent()
	p.startProxy()
	conn := must[*grpc.ClientConn](t)(grpc.NewClient("unix:"+filepath.Join(p.kubelet, "csi.sock"), grpc.WithTransportCredentials(insecure.NewCredentials())))
	t.Cleanup(func() { conn.Close() })
	p.node = csi.NewNodeClient(conn)
	return p
}

func (p *plugin) startAgent() {
	p.agent = p.start(p.t)
	p.agent.waitFor(p.t, "msg=ready")
}

func (p *plugin) startProxy() {
	a := &agent{cmd: exec.Command(program(), "csi-proxy", "--config", filepath.Join(p.kubelet, "csi.yaml")), log: &log{}, end: make(chan error, 1)}
	a.cmd.Stderr = a.log
	check(p.t, a.cmd.Start())
	go func() { a.end <- a.cmd.Wait() }()
	p.t.Cleanup(func() { a.kill() })
	p.proxy = a
	eventually(p.t, "the proxy listens", func() bool {
		c, err := net.Dial("unix", filepath.Join(p.kubelet, "csi.sock"))
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
}

// clean takes away what a failed test left.
func (p *plugin) clean() {
	for _, e := range strings.Split(tryTool("dmsetup", "ls"), "\n") {
		if name, _, _ := strings.Cut(e, "\t"); strings.HasPrefix(name, "v-csi-") {
			_ = exec.Command("umount", "-l", "/dev/mapper/"+name).Run()
			_ = exec.Command("dmsetup", "remove", "--force", name).Run()
		}
	}
	for _, path := range strings.Split(tryTool("findmnt", "-rno", "TARGET"), "\n") {
		if strings.HasPrefix(path, p.kubelet) {
			_ = exec.Command("umount", "-l", path).Run()
		}
	}
}

func tryTool(name string, args ...string) string {
	out, _ := exec.Command(name, args...).Output()
	return string(out)
}

// loopOf is the loop device over an image.
func loopOf(file string) string {
	device, _, _ := strings.Cut(tryTool("losetup", "-j", file), ":")
	return device
}

func (p *plugin) attach(r *csi.NodePublishVolumeRequest) error {
	file := p.storage.image(r.GetVolumeId())
	if file == "" {
		return fmt.Errorf("no volume %q", r.GetVolumeId())
	}
	device := loopOf(file)
	if p.lie != "" {
		device = p.lie
	} else if device == "" {
		out, err := exec.Command("losetup", "-f", "--show", file).Output()
		if err != nil {
			return err
		}
		device = strings.TrimSpace(string(out))
	}
	f, err := os.OpenFile(r.GetTargetPath(), os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	_ = f.Close()
	return exec.Command("mount", "--bind", device, r.GetTargetPath()).Run()
}

func (p *plugin) detach(r *csi.NodeUnpublishVolumeRequest) error {
	_ = exec.Command("umount", r.GetTargetPath()).Run()
	if file := p.storage.image(r.GetVolumeId()); file != "" {
		if device := loopOf(file); device != "" {
			return exec.Command("losetup", "-d", device).Run()
		}
	}
	return nil
}

func (p *plugin) grow(r *csi.NodeExpandVolumeRequest) error {
	file := p.storage.image(r.GetVolumeId())
	return exec.Command("losetup", "-c", loopOf(file)).Run()
}

func (p *plugin) at(kind, handle string) string { return filepath.Join(p.kubelet, kind+"-"+handle) }

func capability(fs string) *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
	if fs == "" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fs}}
	}
	return c
}

// patience is as long as kubelet waits.
func (p *plugin) patience() (context.Context, context.CancelFunc) {
	return context.WithTimeout(p.t.Context(), 2*time.Minute)
}

func (p *plugin) stage(handle, fs string) error {
	ctx, cancel := p.patience()
	defer cancel()
	check(p.t, os.MkdirAll(p.at("stage", handle), 0o755))
	_, err := p.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: handle, StagingTargetPath: p.at("stage", handle), VolumeCapability: capability(fs)})
	return err
}

func (p *plugin) publish(handle, fs string) error {
	ctx, cancel := p.patience()
	defer cancel()
	_, err := p.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: handle, StagingTargetPath: p.at("stage", handle), TargetPath: p.at("pod", handle), VolumeCapability: capability(fs),
	})
	return err
}

// expand makes the volume larger, as the controller does, and asks for the rest.
func (p *plugin) expand(handle, fs string, size int64) error {
	check(p.t, os.Truncate(p.storage.image(handle), size))
	ctx, cancel := p.patience()
	defer cancel()
	_, err := p.node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
		VolumeId: handle, VolumePath: p.at("pod", handle), StagingTargetPath: p.at("stage", handle), VolumeCapability: capability(fs),
		CapacityRange: &csi.CapacityRange{RequiredBytes: size},
	})
	return err
}

func (p *plugin) unpublish(handle string) error {
	ctx, cancel := p.patience()
	defer cancel()
	_, err := p.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: handle, TargetPath: p.at("pod", handle)})
	return err
}

func (p *plugin) unstage(handle string) error {
	ctx, cancel := p.patience()
	defer cancel()
	_, err := p.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: handle, StagingTargetPath: p.at("stage", handle)})
	return err
}

// up stages and publishes.
func (p *plugin) up(handle, fs string) {
	p.t.Helper()
	p.says(p.stage(handle, fs))
	p.says(p.publish(handle, fs))
}

func (p *plugin) down(handle string) {
	p.t.Helper()
	p.says(p.unpublish(handle))
	p.says(p.unstage(handle))
}

func (p *plugin) says(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatalf("%s: %v\nthe proxy said:\n%s\nthe agent said:\n%s", p.name, err, tail(p.proxy.log.String()), tail(p.agent.log.String()))
	}
}

// pattern is what a pod writes, on a filesystem or on the device.
func (p *plugin) write(handle, fs, text string) {
	p.t.Helper()
	if fs != "" {
		put(p.t, filepath.Join(p.at("pod", handle), "note"), text)
		tool(p.t, "sync", "-f", p.at("pod", handle))
		return
	}
	f := must[*os.File](p.t)(os.OpenFile(p.at("pod", handle), os.O_WRONLY, 0))
	must[int](p.t)(f.Write([]byte(text)))
	check(p.t, f.Sync())
	check(p.t, f.Close())
}

func (p *plugin) holds(handle, fs, text string) {
	p.t.Helper()
	if fs != "" {
		holds(p.t, filepath.Join(p.at("pod", handle), "note"), text)
		return
	}
	f := must[*os.File](p.t)(os.Open(p.at("pod", handle)))
	defer f.Close()
	got := make([]byte, len(text))
	must[int](p.t)(f.ReadAt(got, 0))
	if string(got) != text {
		p.t.Errorf("the device holds %q, not %q", got, text)
	}
}

// nothingIsLeft demands that a node has neither mapping nor mount nor loop of a volume.
func (p *plugin) nothingIsLeft(handle string) {
	p.t.Helper()
	for what, got := range map[string]string{
		"mappings": tryTool("dmsetup", "ls"), "mounts": tryTool("findmnt", "-rno", "TARGET"), "loops": tryTool("losetup", "-j", p.storage.image(handle)),
	} {
		for _, word := range []string{"v-csi-" + handle, p.kubelet + "/raw/", p.at("stage", handle), p.at("pod", handle), p.storage.image(handle)} {
			if word != "" && strings.Contains(got, word) {
				p.t.Errorf("%s: %s", what, got)
			}
		}
	}
	if left, _ := filepath.Glob(p.kubelet + "/raw/*"); len(left) > 0 {
		p.t.Errorf("left are %v", left)
	}
}

// TestDiskVolumesOfACSIDriver is the life of volumes: on one node, grown, on another.
func TestDiskVolumesOfACSIDriver(t *testing.T) {
	for _, integrity := range some(t, 1, []string{"none", "hmac-sha256", "aegis128"}) {
		t.Run(integrity, func(t *testing.T) { volumesOfACSIDriver(t, integrity) })
	}
}

func volumesOfACSIDriver(t *testing.T, integrity string) {
	_, nodes := lab()
	began := time.Now()
	s := &storage{images: map[string]string{"ext4-" + integrity: image(t, 128*mib), "xfs-" + integrity: image(t, 400*mib), "block-" + integrity: image(t, 64*mib)}}
	one, two := newPlugin(t, nodes[0], s, "integrity: "+integrity), newPlugin(t, nodes[1], s, "integrity: "+integrity)
	t.Cleanup(func() { t.Logf("took %v", time.Since(began)) })
	const pattern = "a pattern that a pod has written, and nobody else"
	for _, kind := range append(some(t, 1, []string{"ext4", "xfs"}), "block") {
		t.Run(kind, func(t *testing.T) {
			one.t, two.t = t, t
			handle, fs := kind+"-"+integrity, kind
			if kind == "block" {
				fs = ""
			}
			id := "v-csi-" + handle
			removed(t, id, id+"_dif")
			one.up(handle, fs)
			one.up(handle, fs) // again, as kubelet does
			one.write(handle, fs, pattern)
			before := one.size(handle, fs)
			st := must[os.FileInfo](t)(os.Stat(s.image(handle)))
			if integrity == "none" {
				one.says(one.expand(handle, fs, st.Size()+48*mib))
				if after := one.size(handle, fs); after < before+40*mib {
					t.Errorf("it has %d bytes, and had %d", after, before)
				}
			} else if err := one.expand(handle, fs, st.Size()+48*mib); status.Code(err) != codes.FailedPrecondition {
				t.Errorf("it grows: %v", err)
			}
			one.holds(handle, fs, pattern)
			// The other node, while this one has it.
			if err := two.stage(handle, fs); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "held") {
				t.Errorf("two nodes have it: %v", err)
			}
			one.down(handle)
			two.says(two.unstage(handle)) // now: both nodes have one kernel, and one name for the mapping
			one.nothingIsLeft(handle)
			two.up(handle, fs)
			two.holds(handle, fs, pattern)
			two.down(handle)
			two.nothingIsLeft(handle)
			if raw := must[[]byte](t)(os.ReadFile(s.image(handle))); bytes.Contains(raw, []byte(pattern)) {
				t.Error("what the pod wrote lies on the storage")
			}
		})
	}
	one.t, two.t = t, t
}

// size is what a pod sees.
func (p *plugin) size(handle, fs string) int64 {
	p.t.Helper()
	ctx, cancel := p.patience()
	defer cancel()
	a := must[*csi.NodeGetVolumeStatsResponse](p.t)(p.node.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: handle, VolumePath: p.at("pod", handle)}))
	return a.GetUsage()[0].GetTotal()
}

// TestDiskACSIDriverThatLies: what it attaches is proved, whatever it says.
func TestDiskACSIDriverThatLies(t *testing.T) {
	s := &storage{images: map[string]string{"a": image(t, 64*mib), "b": image(t, 64*mib), "new": image(t, 64*mib)}}
	p := newPlugin(t, first(t), s)
	removed(t, "v-csi-a", "v-csi-b", "v-csi-new")
	p.up("a", "ext4")
	p.write("a", "ext4", "of a")
	p.up("b", "ext4")
	p.down("b")
	b := loop(t, s.image("b"))
	foreign := disk(t, 64*mib)
	tool(t, "mkfs.ext4", "-q", foreign)
	used := disk(t, 64*mib)
	tool(t, "mkfs.ext4", "-q", used)
	at := t.TempDir()
	tool(t, "mount", "-o", "ro", used, at) // or it is its own filesystem that writes, some seconds later
	t.Cleanup(func() { _ = exec.Command("umount", at).Run() })
	for name, lie := range map[string]string{
		"another volume, which is open": loopOf(s.image("a")), "another volume": b, "somebody's filesystem": foreign, "a filesystem in use": used, "the mapping of an open volume": "/dev/mapper/v-csi-a",
	} {
		sum := digest(t, lie)
		p.lie = lie
		err := p.stage("new", "ext4")
		if status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v", name, err)
		}
		p.says(p.unstage("new"))
		// An open one is written by its own filesystem.
		if !strings.Contains(name, "open") && digest(t, lie) != sum {
			t.Errorf("%s was written", name)
		}
	}
	// One that exchanges the device under a staged volume.
	raw, _ := filepath.Glob(p.kubelet + "/raw/*/device")
	if len(raw) != 1 {
		t.Fatalf("raw devices are %v", raw)
	}
	tool(t, "mount", "--bind", b, raw[0])
	if err := p.stage("a", "ext4"); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "the volume is open on device") {
		t.Errorf("it took another device: %v", err)
	}
	tool(t, "umount", raw[0])
	p.lie = ""
	p.holds("a", "ext4", "of a")
	p.says(p.stage("a", "ext4"))
	p.down("a")
	p.nothingIsLeft("a")
}

// TestDiskACSIVolumeSurvivesTheEndOfItsParts: the proxy and the agent are killed in the
// middle of calls, which are repeated until they succeed.
func TestDiskACSIVolumeSurvivesTheEndOfItsParts(t *testing.T) {
	s := &storage{images: map[string]string{"k": image(t, 96*mib)}}
	p := newPlugin(t, first(t), s)
	removed(t, "v-csi-k")
	r := seed.Rand(t)
	written := ""
	size := int64(96 * mib)
	repeat := func(what string, call func() error) {
		t.Helper()
		ended := make(chan struct{})
		kill := r.IntN(3)
		go func() {
			defer close(ended)
			time.Sleep(time.Duration(r.IntN(700)) * time.Millisecond)
			if kill == 1 {
				p.agent.kill()
			}
			if kill != 2 {
				p.proxy.kill()
			}
		}()
		err := call()
		<-ended
		if kill == 1 {
			p.startAgent()
		}
		if kill != 2 {
			p.startProxy()
		}
		for tries := 0; err != nil; tries++ {
			if tries == 50 {
				p.says(fmt.Errorf("%s: %w", what, err))
			}
			time.Sleep(200 * time.Millisecond)
			err = call()
		}
		if n := strings.Count(tryTool("dmsetup", "ls"), "v-csi-k"); n > 1 {
			t.Fatalf("%d mappings after %s", n, what)
		}
	}
	for round := range rounds(t, 3) {
		repeat("stage", func() error { return p.stage("k", "ext4") })
		repeat("publish", func() error { return p.publish("k", "ext4") })
		if written != "" {
			p.holds("k", "ext4", written)
		}
		written = fmt.Sprintf("of round %d", round)
		p.write("k", "ext4", written)
		if round == 1 {
			size += 32 * mib
			repeat("expand", func() error { return p.expand("k", "ext4", size) })
		}
		p.holds("k", "ext4", written)
		repeat("unpublish", func() error { return p.unpublish("k") })
		repeat("unstage", func() error { return p.unstage("k") })
		p.nothingIsLeft("k")
	}
}

// TestDiskACSIVolumeThatWasNeverFinishedIsGivenBack: the agent is killed while it makes a
// filesystem, and the pod is deleted before anybody tries again.
func TestDiskACSIVolumeThatWasNeverFinishedIsGivenBack(t *testing.T) {
	p := newPlugin(t, first(t), &storage{images: map[string]string{"half": image(t, 96*mib)}})
	removed(t, "v-csi-half")
	staged := make(chan error, 1)
	go func() { staged <- p.stage("half", "ext4") }()
	p.agent.waitFor(t, "step=mapped")
	p.agent.kill()
	t.Logf("stage ended with %v", <-staged)
	p.startAgent()
	p.says(p.unstage("half"))
	p.nothingIsLeft("half")
	p.says(p.stage("half", "ext4")) // it is made anew
	p.says(p.unstage("half"))
	p.nothingIsLeft("half")
}

// TestDiskACSIVolumeWhoseDiskVanished: a disk is taken away under an open volume, comes
// back with another number, and the volume is opened on it again.
func TestDiskACSIVolumeWhoseDiskVanished(t *testing.T) {
	fs := ""
	if rounds(t, 1) > 1 {
		fs = "ext4" // whose protection against a second mount waits for a minute
	}
	p := newPlugin(t, first(t), &storage{images: map[string]string{}})
	removed(t, "v-csi-gone")
	tool(t, "/run/modprobe", "sd_mod")
	tool(t, "/run/modprobe", "scsi_debug", "dev_size_mb=64", "delay=0")
	t.Cleanup(func() { _ = exec.Command("/sbin/modprobe", "-r", "-d", "/run/kernel", "scsi_debug").Run() })
	p.driver.Publish = func(r *csi.NodePublishVolumeRequest) error {
		// As drivers without a loop do: the node itself.
		return exec.Command("mknod", r.GetTargetPath(), "b", scsiNumber(t)[0], scsiNumber(t)[1]).Run()
	}
	p.driver.Unpublish = func(r *csi.NodeUnpublishVolumeRequest) error { return os.Remove(r.GetTargetPath()) }
	p.up("gone", fs)
	p.write("gone", fs, "kept")
	tool(t, "sync")
	pod := must[*os.File](t)(os.Open(p.at("pod", "gone")))
	disk := scsiDisk(t)
	check(t, os.WriteFile("/sys/block/"+disk+"/device/delete", []byte("1"), 0))
	if out := p.must(t, "status", "--socket", filepath.Join(p.dir, "agent.sock"), "v-csi-gone"); !strings.Contains(out, "the disk of this volume is gone") {
		t.Errorf("status says\n%s", out)
	}
	hosts, _ := filepath.Glob("/sys/class/scsi_host/host*/scan")
	for _, h := range hosts {
		check(t, os.WriteFile(h, []byte("- - -"), 0))
	}
	// Another mapping of that name cannot be while a pod uses the old one.
	if err := p.stage("gone", fs); status.Code(err) != codes.Unavailable {
		t.Errorf("staged under a pod that has the old one: %v", err)
	}
	check(t, pod.Close())
	p.says(p.unpublish("gone"))
	p.up("gone", fs)
	p.holds("gone", fs, "kept")
	if !strings.Contains(p.agent.log.String(), "the disk below an open volume is gone") {
		t.Error("the agent did not see it")
	}
	p.down("gone")
	p.nothingIsLeft("gone")
}

// scsiDisk is the name of the one disk of scsi_debug.
func scsiDisk(t *testing.T) string {
	t.Helper()
	var found []string
	eventually(t, "a SCSI disk is there", func() bool {
		found, _ = filepath.Glob("/sys/block/sd*")
		return len(found) == 1
	})
	return filepath.Base(found[0])
}

func scsiNumber(t *testing.T) []string {
	return strings.Split(strings.TrimSpace(string(must[[]byte](t)(os.ReadFile("/sys/block/"+scsiDisk(t)+"/dev")))), ":")
}
