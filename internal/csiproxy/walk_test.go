package csiproxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/test/sim/csidriver"
	"github.com/keyagent/keyagent/test/sim/seed"
)

// machine is a node on which everything may fail before it does something, or after: its
// storage, a driver, an agent, the key service's records, and the mounts of its kernel. It
// says what must never be.
type machine struct {
	nodev1.UnimplementedNodeServer
	t   *testing.T
	cfg *Config

	mu       sync.Mutex
	rand     *rand.Rand
	faulty   bool
	careless bool                // a driver that mounts again what is mounted, and forgets to unmount
	owner    map[string]string   // of a disk's header, by the driver's handle; empty: blank
	content  map[string]int      // of a disk
	records  map[string]bool     // volumes that exist, by ID
	formats  map[string]int      // by ID
	attached map[string][]string // handles by path, the last one on top
	staged   map[string]bool     // by the driver
	open     map[string]*nodev1.Volume
	disk     map[string]string // handle below an open volume
	shown    map[string]string // volume ID by target
	faults   int
}

var errFault = status.Error(codes.Unavailable, "a fault of the test")

// fault fails one call in six, half of them afterwards.
func (m *machine) fault(do func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	when := m.rand.IntN(12)
	if !m.faulty {
		when = 2
	}
	if when < 2 {
		m.faults++
	}
	if when == 0 {
		return errFault
	}
	if err := do(); err != nil {
		return err
	}
	if when == 1 {
		return errFault
	}
	return nil
}

func (m *machine) never(format string, args ...any) {
	m.t.Helper()
	m.t.Errorf(format, args...)
}

func (m *machine) at(path string) string {
	if on := m.attached[path]; len(on) > 0 {
		return on[len(on)-1]
	}
	return ""
}

func refused(format string, args ...any) error {
	return status.Errorf(codes.FailedPrecondition, format, args...)
}

// The driver.

func (m *machine) stageRaw(r *csi.NodeStageVolumeRequest) error {
	return m.fault(func() error { m.staged[r.GetVolumeId()] = true; return nil })
}

func (m *machine) unstageRaw(r *csi.NodeUnstageVolumeRequest) error {
	return m.fault(func() error {
		for path, on := range m.attached {
			if slices.Contains(on, r.GetVolumeId()) {
				m.never("%s is unstaged while it is published at %s", r.GetVolumeId(), path)
			}
		}
		delete(m.staged, r.GetVolumeId())
		return nil
	})
}

func (m *machine) publishRaw(r *csi.NodePublishVolumeRequest) error {
	return m.fault(func() error {
		if !m.staged[r.GetVolumeId()] {
			return errors.New("it is not staged")
		}
		path := r.GetTargetPath()
		if m.careless || m.at(path) != r.GetVolumeId() {
			m.attached[path] = append(m.attached[path], r.GetVolumeId())
		}
		return os.WriteFile(path, nil, 0o600)
	})
}

func (m *machine) unpublishRaw(r *csi.NodeUnpublishVolumeRequest) error {
	return m.fault(func() error {
		path := r.GetTargetPath()
		for id, v := range m.open {
			if v.GetDevice() == path {
				m.never("the driver detaches %s, and %s is open on it", path, id)
			}
		}
		if on := m.attached[path]; len(on) > 0 && (!m.careless || m.rand.IntN(3) > 0) {
			m.attached[path] = on[:len(on)-1]
		}
		if m.at(path) != "" {
			return nil // of a careless driver: one mount is left
		}
		_ = os.Remove(path)
		return nil
	})
}

// The agent.

func (m *machine) OpenProgress(r *nodev1.OpenRequest, s grpc.ServerStreamingServer[nodev1.OpenEvent]) error {
	err := m.fault(func() error {
		id, handle := r.GetId(), m.at(r.GetDevice())
		switch v := m.open[id]; {
		case handle == "":
			return refused("no device")
		case v != nil && m.disk[id] != handle:
			return refused("it is open on another device")
		case v != nil:
			return nil
		case m.records[id] && m.owner[handle] != id:
			return refused("header refused")
		case !m.records[id] && m.owner[handle] != "":
			return refused("not blank")
		case !m.records[id]:
			m.owner[handle], m.records[id] = id, true
			if m.formats[id]++; m.formats[id] > 1 {
				m.never("%s is formatted a second time", id)
			}
			if m.rand.IntN(4) == 0 && m.faulty {
				return errFault // it ended before it was mapped
			}
		}
		for other, on := range m.disk {
			if on == handle && m.open[other] != nil {
				m.never("%s is opened on the disk of %s", id, other)
			}
		}
		v := &nodev1.Volume{Id: id, Device: r.GetDevice(), State: "open", Mapped: "/dev/mapper/" + id, MountPoint: r.GetMountPoint(), Bytes: 1 << 20}
		if v.GetMountPoint() != "" {
			v.State = "mounted"
		}
		m.open[id], m.disk[id] = v, handle
		return nil
	})
	if err != nil {
		return err
	}
	m.mu.Lock()
	v := m.open[r.GetId()]
	m.mu.Unlock()
	return s.Send(&nodev1.OpenEvent{Step: "done", Volume: v})
}

func (m *machine) Status(_ context.Context, r *nodev1.StatusRequest) (out *nodev1.StatusResponse, err error) {
	err = m.fault(func() error {
		v := m.open[r.GetId()]
		if v == nil {
			return status.Error(codes.NotFound, "no volume")
		}
		out = &nodev1.StatusResponse{Volume: v}
		return nil
	})
	return out, err
}

func (m *machine) Close(_ context.Context, r *nodev1.CloseRequest) (*nodev1.CloseResponse, error) {
	return &nodev1.CloseResponse{}, m.fault(func() error {
		for target, id := range m.shown {
			if id == r.GetId() {
				return refused("it is in use at %s", target)
			}
		}
		delete(m.open, r.GetId())
		delete(m.disk, r.GetId())
		return nil
	})
}

// The kernel. A mapping is 1000 and more, a disk less.

func (m *machine) number(name string) uint64 {
	n := uint64(0)
	for _, c := range name {
		n = n*31%499 + uint64(c)
	}
	return n + 1
}

func (m *machine) Device(path string) (n uint64, err error) {
	err = m.fault(func() error {
		if on := m.at(path); on != "" {
			n = m.number(on)
		}
		return nil
	})
	return n, err
}

func (m *machine) Number(path string) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	id := filepath.Base(path)
	if m.open[id] == nil {
		return 0
	}
	return 1000 + m.number(id)
}

func (m *machine) Holders(device uint64) (out []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, on := range m.disk {
		if m.number(on) == device {
			out = append(out, cmp.Or(mappingName(id), id))
		}
	}
	return out
}

func (m *machine) bind(device uint64, to string) error {
	return m.fault(func() error {
		for id, v := range m.open {
			if 1000+m.number(id) != device {
				continue
			}
			if was := m.shown[to]; was != "" && was != id {
				return refused("%s is shown there", was)
			}
			m.shown[to] = v.GetId()
			return nil
		}
		return refused("the device is gone")
	})
}

func (m *machine) BindFolder(_ string, device uint64, to string, _ []string) error {
	return m.bind(device, to)
}

func (m *machine) BindDevice(_ string, device uint64, to string) error { return m.bind(device, to) }

func (m *machine) Points(device uint64) (out []string, err error) {
	err = m.fault(func() error {
		for to, id := range m.shown {
			if 1000+m.number(id) == device {
				out = append(out, to)
			}
		}
		for id, v := range m.open {
			if at := v.GetMountPoint(); at != "" && 1000+m.number(id) == device {
				out = append(out, at)
			}
		}
		return nil
	})
	return out, err
}

func (m *machine) Clear(path string) error {
	return m.fault(func() error {
		for id, v := range m.open {
			if v.GetDevice() == path {
				m.never("%s is cleared, and %s is open on it", path, id)
			}
		}
		delete(m.attached, path)
		delete(m.shown, path)
		_ = os.Remove(path)
		return nil
	})
}

func (m *machine) Remove(dir string) error { return m.fault(func() error { return os.RemoveAll(dir) }) }

// claim is what a kubelet knows of one volume on its node.
type claim struct {
	handle     string
	capability *csi.VolumeCapability
	staging    string
	targets    [2]string
	staged     bool
	published  [2]bool // or it may be
	written    int
}

// kubelet calls the proxy as a kubelet does, which asks again after any error.
type kubelet struct {
	*machine
	proxy  *Proxy
	claims []*claim
	begin  func() *Proxy
	calls  map[string]int // that succeeded
	names  []string       // of the last calls, for people
}

// ask calls once, or twice at one time.
func ask[A any](k *kubelet, what string, f func(*Proxy) (A, error)) error {
	k.mu.Lock()
	twice := k.faulty && k.rand.IntN(8) == 0
	k.mu.Unlock()
	p := k.proxy
	also := make(chan struct{})
	go func() {
		defer close(also)
		if twice {
			_, _ = f(p)
		}
	}()
	_, err := f(p)
	<-also
	if err == nil {
		k.calls[strings.Fields(what)[0]]++
	}
	k.names = append(k.names, fmt.Sprintf("%s: %v", what, err))
	return err
}

func (k *kubelet) stage(c *claim) error {
	err := ask(k, "stage "+c.handle, func(p *Proxy) (*csi.NodeStageVolumeResponse, error) {
		return p.NodeStageVolume(ctx(), &csi.NodeStageVolumeRequest{VolumeId: c.handle, StagingTargetPath: c.staging, VolumeCapability: c.capability})
	})
	c.staged = c.staged || err == nil
	return err
}

func (k *kubelet) publish(c *claim, i int) error {
	c.published[i] = true
	err := ask(k, fmt.Sprintf("publish %s %d", c.handle, i), func(p *Proxy) (*csi.NodePublishVolumeResponse, error) {
		return p.NodePublishVolume(ctx(), &csi.NodePublishVolumeRequest{VolumeId: c.handle, StagingTargetPath: c.staging, TargetPath: c.targets[i], VolumeCapability: c.capability})
	})
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	id := k.cfg.volumeID(c.handle)
	disk := k.disk[k.shown[c.targets[i]]]
	switch {
	case k.shown[c.targets[i]] != id:
		k.never("a pod of %s sees %q", c.handle, k.shown[c.targets[i]])
	case disk != c.handle:
		k.never("%s lies on the disk %q", c.handle, disk)
	case k.content[disk] != c.written:
		k.never("%s holds %d, and %d was written", c.handle, k.content[disk], c.written)
	default:
		c.written++
		k.content[disk] = c.written
	}
	return nil
}

func (k *kubelet) unpublish(c *claim, i int) error {
	err := ask(k, fmt.Sprintf("unpublish %s %d", c.handle, i), func(p *Proxy) (*csi.NodeUnpublishVolumeResponse, error) {
		return p.NodeUnpublishVolume(ctx(), &csi.NodeUnpublishVolumeRequest{VolumeId: c.handle, TargetPath: c.targets[i]})
	})
	if err != nil {
		return err
	}
	c.published[i] = false
	k.mu.Lock()
	defer k.mu.Unlock()
	if id := k.shown[c.targets[i]]; id != "" {
		k.never("%s is unpublished, and a pod sees %s", c.handle, id)
	}
	return nil
}

func (k *kubelet) unstage(c *claim) error {
	err := ask(k, "unstage "+c.handle, func(p *Proxy) (*csi.NodeUnstageVolumeResponse, error) {
		return p.NodeUnstageVolume(ctx(), &csi.NodeUnstageVolumeRequest{VolumeId: c.handle, StagingTargetPath: c.staging})
	})
	if err != nil {
		return err
	}
	c.staged = false
	k.mu.Lock()
	defer k.mu.Unlock()
	for path, on := range k.attached {
		if slices.Contains(on, c.handle) {
			k.never("%s is unstaged, and attached at %s", c.handle, path)
		}
	}
	if id := k.cfg.volumeID(c.handle); k.open[id] != nil || k.staged[c.handle] || exists(k.cfg.private(c.handle).dir) {
		k.never("%s is unstaged; open %v, staged by the driver %v, its folder there %v", c.handle, k.open[id] != nil, k.staged[c.handle], exists(k.cfg.private(c.handle).dir))
	}
	return nil
}

// step is one thing that a kubelet, or fate, may do.
func (k *kubelet) step() {
	k.mu.Lock()
	what, c, i := k.rand.IntN(20), k.claims[k.rand.IntN(len(k.claims))], k.rand.IntN(2)
	k.mu.Unlock()
	switch {
	case what < 6:
		_ = k.stage(c)
	case what < 11 && c.staged:
		_ = k.publish(c, i)
	case what < 15 && c.published[i]:
		_ = k.unpublish(c, i)
	case what < 18 && c.published == [2]bool{}:
		c.staged = false // or not: it has to be staged again before it is used
		_ = k.unstage(c)
	case what == 18:
		k.names = append(k.names, "the proxy starts anew")
		k.proxy = k.begin()
	case what == 19:
		k.reboot()
	}
}

// reboot leaves disks, records, and the proxy's folder.
func (k *kubelet) reboot() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.rand.IntN(3) > 0 {
		return
	}
	k.names = append(k.names, "the machine starts anew")
	clear(k.attached)
	clear(k.staged)
	clear(k.open)
	clear(k.disk)
	clear(k.shown)
	k.proxy = k.begin()
	for _, c := range k.claims {
		c.staged = false
	}
}

// settles brings each volume down, up and down again, on a machine where nothing fails.
func (k *kubelet) settles() error {
	k.mu.Lock()
	k.faulty = false
	k.mu.Unlock()
	for _, c := range k.claims {
		for _, do := range []func() error{
			func() error { return k.unpublish(c, 0) }, func() error { return k.unpublish(c, 1) }, func() error { return k.unstage(c) },
			func() error { return k.stage(c) }, func() error { return k.publish(c, 0) }, func() error { return k.publish(c, 1) },
			func() error { return k.unpublish(c, 0) }, func() error { return k.unpublish(c, 1) }, func() error { return k.unstage(c) },
		} {
			if err := do(); err != nil {
				return err
			}
		}
	}
	return nil
}

func newKubelet(t *testing.T, r *rand.Rand) *kubelet {
	t.Helper()
	dir := t.TempDir()
	m := &machine{
		t: t, rand: r, faulty: true, careless: r.IntN(2) == 0,
		cfg:   &Config{Kubelet: dir, Private: filepath.Join(dir, "p"), Prefix: "csi-", Filesystem: "ext4"},
		owner: map[string]string{}, content: map[string]int{}, records: map[string]bool{}, formats: map[string]int{},
		attached: map[string][]string{}, staged: map[string]bool{}, open: map[string]*nodev1.Volume{}, disk: map[string]string{}, shown: map[string]string{},
	}
	listen := func(name string) (net.Listener, string, grpc.DialOption) {
		path := filepath.Join(dir, name)
		return must(t, err2(net.Listen("unix", path)), nil), path, grpc.WithTransportCredentials(insecure.NewCredentials())
	}
	server := grpc.NewServer()
	nodev1.RegisterNodeServer(server, m)
	al, ap, plain := listen("agent")
	agentConn := serve(t, server, al, ap, plain)
	driver := &csidriver.Driver{
		Name: "test.example", Can: []csi.NodeServiceCapability_RPC_Type{csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME},
		Stage: m.stageRaw, Unstage: m.unstageRaw, Publish: m.publishRaw, Unpublish: m.unpublishRaw,
	}
	dl, dp, plain := listen("driver")
	driverConn := serve(t, driver.Server(), dl, dp, plain)
	k := &kubelet{machine: m, calls: map[string]int{}}
	k.begin = func() *Proxy {
		life, end := context.WithCancel(context.Background())
		t.Cleanup(end)
		return New(life, Options{Config: m.cfg, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Mounts: m, Agent: agentConn, Driver: driverConn})
	}
	k.proxy = k.begin()
	for i, c := range []*csi.VolumeCapability{filesystem(once, "ext4"), block(once), filesystem(once, "xfs")} {
		name := fmt.Sprintf("vol-%d", i)
		k.claims = append(k.claims, &claim{handle: name, capability: c, staging: filepath.Join(dir, name),
			targets: [2]string{filepath.Join(dir, name+"-a"), filepath.Join(dir, name+"-b")}})
	}
	return k
}

// TestWhateverFailsAVolumeIsNeverFormattedTwice: a kubelet's calls in any order that a kubelet
// has, on a machine on which each of the parts fails, before it did something or
// afterwards; the proxy ends between any two calls, and so does the machine. Nothing is lost
// then, nothing left, and all of it heals as soon as nothing fails.
func TestWhateverFailsAVolumeIsNeverFormattedTwice(t *testing.T) {
	r := seed.Rand(t)
	done, faults := map[string]int{}, 0
	for walk := range 40 {
		k := newKubelet(t, rand.New(rand.NewPCG(r.Uint64(), 0)))
		for range 150 {
			k.step()
		}
		if err := k.settles(); err != nil {
			t.Errorf("it does not heal: %v", err)
		}
		if t.Failed() {
			t.Fatalf("walk %d, careless %v:\n%s", walk, k.careless, strings.Join(k.names[max(0, len(k.names)-60):], "\n"))
		}
		for call, n := range k.calls {
			done[call] += n
		}
		faults += k.faults
	}
	t.Logf("calls that succeeded: %v; faults: %d", done, faults)
	for _, call := range []string{"stage", "publish", "unpublish", "unstage"} {
		if done[call] < 200 {
			t.Errorf("%s succeeded %d times: the walk shows little", call, done[call])
		}
	}
}
