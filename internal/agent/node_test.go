package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/luks"
)

// noKeys is a key service that has none.
type noKeys struct{ asked []string }

var errNoKeys = errors.New("no keys here")

func (k *noKeys) GetKey(_ context.Context, volume string, _ bool) (*Key, error) {
	k.asked = append(k.asked, volume)
	return nil, failure.New(failure.PolicyDenied, errNoKeys, "")
}

func (k *noKeys) Confirm(context.Context, *Key, luks.MAC) error { return errNoKeys }

func uid(n uint32) *uint32 { return &n }

// serveNode serves the local API of a node with the volumes a-1 and b-1.
func serveNode(t *testing.T, callers ...Caller) (socket string, keys *noKeys) {
	t.Helper()
	dir, err := os.MkdirTemp("", "node")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	socket, keys = filepath.Join(dir, "s"), &noKeys{}
	cfg := &Config{StateDir: dir, Volumes: []VolumeConfig{{ID: "a-1", Name: "ka-test-a", Device: disk}, {ID: "b-1", Name: "ka-test-b", Device: disk}}}
	log := slog.New(slog.DiscardHandler)
	l, err := listenUnix(socket)
	if err != nil {
		t.Fatal(err)
	}
	s := newNodeServer(NewManager(cfg, keys, log, nil), callers, log)
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

func TestCallersMayDoWhatTheConfigurationSays(t *testing.T) {
	self := uint32(os.Getuid())
	socket, keys := serveNode(t,
		Caller{UID: uid(self), Operations: []string{"open", "list"}, Volumes: []string{"a-*"}},
		Caller{UID: uid(self + 1), Operations: []string{"open", "list", "close", "format"}, Volumes: []string{"*"}})
	n := dial(t, socket)
	if _, err := n.Open(t.Context(), &nodev1.OpenRequest{Id: "a-1"}); classOf(err) != failure.PolicyDenied || !strings.Contains(err.Error(), errNoKeys.Error()) {
		t.Errorf("an allowed open did not reach the key service: %v", err)
	}
	for name, err := range map[string]error{
		"another tenant's volume (case 31)":  second(n.Open(t.Context(), &nodev1.OpenRequest{Id: "b-1"})),
		"formatting, which was not granted":  second(n.Open(t.Context(), &nodev1.OpenRequest{Id: "a-1", Format: true})),
		"closing, which was not granted":     second(n.Close(t.Context(), &nodev1.CloseRequest{Id: "a-1"})),
		"status, which was not granted":      second(n.Status(t.Context(), &nodev1.StatusRequest{Id: "a-1"})),
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

func second[A any](_ A, err error) error { return err }

// TestTheKernelSaysWhoCalls runs a caller as another user (case 30).
func TestTheKernelSaysWhoCalls(t *testing.T) {
	if socket := os.Getenv("NODE_SOCKET"); socket != "" {
		_, err := dial(t, socket).List(t.Context(), &nodev1.ListRequest{})
		if classOf(err) == failure.PolicyDenied {
			io.WriteString(os.Stdout, "REFUSED "+err.Error())
		}
		return
	}
	socket, _ := serveNode(t, Caller{UID: uid(0), Operations: []string{"list"}, Volumes: []string{"*"}})
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
	if err != nil || !strings.Contains(string(out), "REFUSED") || !strings.Contains(string(out), "uid 65534") {
		t.Fatalf("%v: %s", err, out)
	}
}

// TestWhatStandsAtTheSocketsPath is case 33.
func TestWhatStandsAtTheSocketsPath(t *testing.T) {
	dir, err := os.MkdirTemp("", "sock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
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
