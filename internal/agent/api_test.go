package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
)

// noKeys is a key service that has none.
type noKeys struct{ asked []string }

var errNoKeys = errors.New("no keys here")

func (k *noKeys) GetKey(_ context.Context, r keyclient.Request) (*keyclient.Key, error) {
	k.asked = append(k.asked, r.Volume)
	return nil, failure.New(failure.PolicyDenied, errNoKeys, "")
}

func (k *noKeys) Hold() func() { return func() {} }
func (k *noKeys) BeginFormat(context.Context, *keyclient.Key, keyclient.MACs) (time.Duration, error) {
	return 0, errNoKeys
}
func (k *noKeys) HeaderStands(context.Context, *keyclient.Key) error { return errNoKeys }
func (k *noKeys) Confirm(context.Context, *keyclient.Key) error      { return errNoKeys }
func (k *noKeys) CreateDiskless(context.Context, *keyclient.Key, [32]byte) error {
	return errNoKeys
}
func (k *noKeys) Renew(context.Context, string, []byte) (*keyclient.Lease, error) {
	return nil, errNoKeys
}
func (k *noKeys) Verdict(context.Context, string, bool) error { return errNoKeys }
func (k *noKeys) Rotate(context.Context, *keyclient.Key, keyclient.RotationStep, keyclient.MACs) error {
	return errNoKeys
}
func (k *noKeys) Retire(context.Context, string, []byte) (string, bool, error) {
	return "", false, errNoKeys
}
func (k *noKeys) Release(context.Context, string, []byte) error    { return errNoKeys }
func (k *noKeys) KeepSession(context.Context, time.Duration) error { return errNoKeys }
func (k *noKeys) Report(string, keyclient.OfflineReport)           {}

func uid(n uint32) *uint32 { return &n }

// shortDir is a folder whose path leaves room for a socket's name.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "node")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// serveNode serves the local API of a node with the volumes a-1 and b-1.
func serveNode(t testing.TB, cfg node.Config) (socket string, keys *noKeys) {
	t.Helper()
	dir := shortDir(t)
	disk := filepath.Join(dir, "disk")
	if err := os.Symlink("/dev/null", disk); err != nil {
		t.Fatal(err)
	}
	socket, keys = filepath.Join(dir, "s"), &noKeys{}
	cfg.Volumes = []node.Volume{{ID: "a-1", Name: "ka-test-a", Device: disk}, {ID: "b-1", Name: "ka-test-b", Device: disk}}
	log := slog.New(slog.DiscardHandler)
	v := NewVolumes(Options{Keys: keys, Log: log, StateDir: filepath.Join(dir, "state"), AppearWait: time.Millisecond})
	for _, one := range cfg.Volumes {
		v.Know(one)
	}
	l, err := listenUnix(socket)
	if err != nil {
		t.Fatal(err)
	}
	s := newNodeServer(t.Context(), v, &cfg, log)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return socket, keys
}

func dial(t testing.TB, socket string) nodev1.NodeClient {
	t.Helper()
	c, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(LocalCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return nodev1.NewNodeClient(c)
}

func classOf(err error) failure.Class { return failure.Of(failure.FromStatus(err)).Class }

func second[A any](_ A, err error) error { return err }

func TestCallersMayDoWhatTheConfigurationSays(t *testing.T) {
	self := uint32(os.Getuid())
	socket, keys := serveNode(t, node.Config{Callers: []node.Caller{
		{UID: uid(self), Operations: []string{"open", "list"}, Volumes: []string{"a-*"}},
		{UID: uid(self + 1), Operations: []string{"open", "list", "close", "format"}, Volumes: []string{"*"}},
	}})
	n := dial(t, socket)
	if _, err := n.Open(t.Context(), &nodev1.OpenRequest{Id: "a-1"}); classOf(err) != failure.PolicyDenied || !strings.Contains(err.Error(), errNoKeys.Error()) {
		t.Errorf("an allowed open did not reach the key service: %v", err)
	}
	for name, err := range map[string]error{
		"another tenant's volume (case 31)":  second(n.Open(t.Context(), &nodev1.OpenRequest{Id: "b-1"})),
		"formatting, which was not granted":  second(n.Open(t.Context(), &nodev1.OpenRequest{Id: "a-1", Format: true})),
		"closing, which was not granted":     second(n.Close(t.Context(), &nodev1.CloseRequest{Id: "a-1"})),
		"status, which was not granted":      second(n.Status(t.Context(), &nodev1.StatusRequest{Id: "a-1"})),
		"resizing, which was not granted":    second(n.Resize(t.Context(), &nodev1.ResizeRequest{Id: "a-1"})),
		"suspending, which was not granted":  second(n.Suspend(t.Context(), &nodev1.SuspendRequest{Id: "a-1"})),
		"resuming, which was not granted":    second(n.Resume(t.Context(), &nodev1.ResumeRequest{Id: "a-1"})),
		"a backup, which was not granted":    second(n.BackupHeader(t.Context(), &nodev1.BackupHeaderRequest{Id: "a-1"})),
		"a restore, which was not granted":   second(n.RestoreHeader(t.Context(), &nodev1.RestoreHeaderRequest{Id: "a-1"})),
		"a path":                             second(n.Open(t.Context(), &nodev1.OpenRequest{Id: "../a-1"})),
		"a volume name of 32 KiB":            second(n.Open(t.Context(), &nodev1.OpenRequest{Id: strings.Repeat("b", 32<<10)})),
		"a volume that is not configured":    second(n.Open(t.Context(), &nodev1.OpenRequest{Id: "c-1"})),
		"a name that begins like an allowed": second(n.Open(t.Context(), &nodev1.OpenRequest{Id: "a"})),
	} {
		if classOf(err) != failure.PolicyDenied || strings.Contains(err.Error(), errNoKeys.Error()) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(keys.asked) != 1 {
		t.Errorf("the key service was asked for %v", keys.asked)
	}
	list, err := n.List(t.Context(), &nodev1.ListRequest{})
	if err != nil || len(list.GetVolumes()) != 1 || list.GetVolumes()[0].GetId() != "a-1" {
		t.Errorf("list: %v, %v", list, err)
	}
}

// TestADynamicVolumeIsOpenedWithinItsRuleOnly: the caller describes it, and the rule
// says which caller, which IDs, which devices and where.
func TestADynamicVolumeIsOpenedWithinItsRuleOnly(t *testing.T) {
	self := uint32(os.Getuid())
	dir := shortDir(t)
	disk := filepath.Join(dir, "pvc-disk")
	if err := os.Symlink("/dev/null", disk); err != nil {
		t.Fatal(err)
	}
	socket, keys := serveNode(t, node.Config{
		Callers: []node.Caller{{UID: uid(self), Operations: []string{"open", "format", "status", "list"}, Volumes: []string{"*"}}},
		Dynamic: []node.Dynamic{
			{UIDs: []uint32{self + 1}, Volumes: []string{"*"}, Devices: []string{dir + "/*"}, Format: true},
			{UIDs: []uint32{self}, Volumes: []string{"pvc-*", "a-*"}, Devices: []string{dir + "/pvc-*"}, Mounts: []string{"/var/lib/csi/*"}, Filesystem: "ext4", Filesystems: []string{"xfs"}},
		},
	})
	n := dial(t, socket)
	ask := func(change func(*nodev1.OpenRequest)) error {
		r := &nodev1.OpenRequest{Id: "pvc-1", Device: disk}
		change(r)
		_, err := n.Open(t.Context(), r)
		return err
	}
	for name, change := range map[string]func(*nodev1.OpenRequest){
		"as the rule says":          func(*nodev1.OpenRequest) {},
		"with another filesystem":   func(r *nodev1.OpenRequest) { r.Filesystem = "xfs" },
		"as a raw device":           func(r *nodev1.OpenRequest) { r.Filesystem = "none" },
		"mounted where it may be":   func(r *nodev1.OpenRequest) { r.MountPoint = "/var/lib/csi/pvc-1" },
		"read-only, with an option": func(r *nodev1.OpenRequest) { r.ReadOnly, r.Options = true, []string{"noatime"} },
		"as a clone":                func(r *nodev1.OpenRequest) { r.Source = "pvc-2" },
	} {
		before := len(keys.asked)
		if err := ask(change); len(keys.asked) != before+1 {
			t.Errorf("%s: it did not reach the key service: %v", name, err)
		}
	}
	before := len(keys.asked)
	for name, change := range map[string]func(*nodev1.OpenRequest){
		"another ID":              func(r *nodev1.OpenRequest) { r.Id = "other" },
		"another device":          func(r *nodev1.OpenRequest) { r.Device = dir + "/disk" },
		"a device further down":   func(r *nodev1.OpenRequest) { r.Device = dir + "/pvc-1/sda" },
		"a path with dots":        func(r *nodev1.OpenRequest) { r.Device = dir + "/pvc-x/../disk" },
		"by label":                func(r *nodev1.OpenRequest) { r.Device = "LABEL=pvc-1" },
		"another filesystem":      func(r *nodev1.OpenRequest) { r.Filesystem = "btrfs" },
		"another mount point":     func(r *nodev1.OpenRequest) { r.MountPoint = "/etc" },
		"dots in the mount point": func(r *nodev1.OpenRequest) { r.MountPoint = "/var/lib/csi/../../../etc" },
		"created":                 func(r *nodev1.OpenRequest) { r.Format = true },
		"an option that is no good": func(r *nodev1.OpenRequest) {
			r.MountPoint, r.Options = "/var/lib/csi/x", []string{"bind"}
		},
		"a configured volume, described": func(r *nodev1.OpenRequest) { r.Id = "a-1" },
		"a configured volume's mapping":  func(r *nodev1.OpenRequest) { r.Name = "ka-test-a" },
		"a clone of another ID":          func(r *nodev1.OpenRequest) { r.Source = "other" },
		"a clone of a configured volume": func(r *nodev1.OpenRequest) { r.Source = "a-1" },
		"a clone of itself":              func(r *nodev1.OpenRequest) { r.Source = "pvc-1" },
	} {
		if err := ask(change); err == nil || len(keys.asked) != before {
			t.Errorf("%s: %v, the key service was asked for %v", name, err, keys.asked[before:])
			before = len(keys.asked)
		}
	}
}

// A clone shows what its source holds: who may not open that makes none of it.
func TestACloneNeedsTheRightToOpenItsSource(t *testing.T) {
	self := uint32(os.Getuid())
	disk := filepath.Join(shortDir(t), "disk")
	if err := os.Symlink("/dev/null", disk); err != nil {
		t.Fatal(err)
	}
	socket, keys := serveNode(t, node.Config{
		Callers: []node.Caller{
			{UID: uid(self), Operations: []string{"open", "format"}, Volumes: []string{"pvc-*"}},
			{UID: uid(self), Operations: []string{"close", "status"}, Volumes: []string{"other-*"}},
		},
		Dynamic: []node.Dynamic{{UIDs: []uint32{self}, Volumes: []string{"*"}, Devices: []string{disk}, Format: true}},
	})
	n := dial(t, socket)
	_, err := n.Open(t.Context(), &nodev1.OpenRequest{Id: "pvc-1", Device: disk, Format: true, Source: "other-1"})
	if classOf(err) != failure.PolicyDenied || len(keys.asked) != 0 {
		t.Errorf("%v, the key service was asked for %v", err, keys.asked)
	}
	if _, err = n.Open(t.Context(), &nodev1.OpenRequest{Id: "pvc-1", Device: disk, Format: true, Source: "pvc-2"}); len(keys.asked) == 0 {
		t.Errorf("a clone of its own was refused: %v", err)
	}
}

func TestAListComesInPages(t *testing.T) {
	self := uint32(os.Getuid())
	socket, _ := serveNode(t, node.Config{Callers: []node.Caller{{UID: uid(self), Operations: []string{"list"}, Volumes: []string{"*"}}}})
	n := dial(t, socket)
	var got []string
	req := &nodev1.ListRequest{PageSize: 1}
	for range 3 {
		resp, err := n.List(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range resp.GetVolumes() {
			got = append(got, v.GetId())
			if v.GetState() != string(Absent) {
				t.Errorf("%s is %s", v.GetId(), v.GetState())
			}
		}
		if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
			break
		}
	}
	if fmt.Sprint(got) != "[a-1 b-1]" {
		t.Errorf("pages hold %v", got)
	}
	if _, err := n.List(t.Context(), &nodev1.ListRequest{PageToken: "not base64!"}); classOf(err) != failure.Usage {
		t.Errorf("a token of nobody: %v", err)
	}
}

// TestTheKernelSaysWhoCalls runs a caller as another user (case 30): one that no rule
// names does not get as far as a call.
func TestTheKernelSaysWhoCalls(t *testing.T) {
	if socket := os.Getenv("NODE_SOCKET"); socket != "" {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err := dial(t, socket).List(ctx, &nodev1.ListRequest{})
		_, _ = io.WriteString(os.Stdout, "CLASS "+string(classOf(err)))
		return
	}
	self := uint32(os.Getuid())
	for name, tt := range map[string]struct {
		caller uint32
		want   string
	}{"a user that no rule names": {self, "CLASS service unreachable"}, "one that a rule names": {65534, "CLASS internal error"}} {
		t.Run(name, func(t *testing.T) {
			socket, _ := serveNode(t, node.Config{Callers: []node.Caller{{UID: uid(tt.caller), Operations: []string{"list"}, Volumes: []string{"*"}}}})
			program := filepath.Join(filepath.Dir(socket), "program")
			data, err := os.ReadFile("/proc/self/exe")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(program, data, 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(program, "-test.run=^TestTheKernelSaysWhoCalls$")
			cmd.Env, cmd.Dir = []string{"NODE_SOCKET=" + socket}, "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			out, err := cmd.CombinedOutput()
			// Without an error the class is that of none.
			if err != nil || !strings.Contains(string(out), tt.want) {
				t.Fatalf("%v: %s", err, out)
			}
		})
	}
}

// TestConnectionsAreBounded: each user has so many, and root always finds a place.
func TestConnectionsAreBounded(t *testing.T) {
	socket, _ := serveNode(t, node.Config{Callers: []node.Caller{{UID: uid(uint32(os.Getuid())), Operations: []string{"list"}, Volumes: []string{"*"}}}})
	open := 0
	for range maxPerUser + 40 {
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		// One that is refused ends at once; one that is served waits for the preface.
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) || err == nil {
			open++
		}
	}
	if open > maxPerUser {
		t.Errorf("%d connections are open, allowed are %d", open, maxPerUser)
	}
}

// TestWhatStandsAtTheSocketsPath is case 33.
func TestWhatStandsAtTheSocketsPath(t *testing.T) {
	dir := shortDir(t)
	path := func(name string) string { return filepath.Join(dir, name) }
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path("stale"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	live, err := net.Listen("unix", path("live"))
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	if err := os.WriteFile(path("file"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path("stale"), path("link")); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		ok   bool
	}{{"nothing", true}, {"stale", true}, {"live", false}, {"file", false}, {"link", false}} {
		l, err := listenUnix(path(tt.name))
		if (err == nil) != tt.ok {
			t.Errorf("%s: %v", tt.name, err)
		}
		if l != nil {
			l.Close()
		}
	}
	if data, err := os.ReadFile(path("file")); err != nil || string(data) != "precious" {
		t.Errorf("the file: %q, %v", data, err)
	}
	if c, err := net.Dial("unix", path("live")); err != nil {
		t.Errorf("the live socket: %v", err)
	} else {
		c.Close()
	}
}
