package cryptmapper_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/csi/cryptmapper"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/node"
)

// driver is the shape that Constellation's CSI drivers call.
type driver interface {
	OpenCryptDevice(ctx context.Context, source, volumeID string, integrity bool) (string, error)
	CloseCryptDevice(volumeID string) error
	ResizeCryptDevice(ctx context.Context, volumeID string) (string, error)
	GetDevicePath(volumeID string) (string, error)
}

var _ driver = (*cryptmapper.CryptMapper)(nil)

// agent is one that keeps volumes in a map.
type agent struct {
	nodev1.UnimplementedNodeServer
	mu      sync.Mutex
	volumes map[string]*nodev1.Volume
	opened  []*nodev1.OpenRequest
	old     bool // it does not know of integrity
}

func (a *agent) Open(_ context.Context, r *nodev1.OpenRequest) (*nodev1.OpenResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.opened = append(a.opened, r)
	if r.GetId() == "other-tenant" {
		return nil, failure.Status(failure.Newf(failure.PolicyDenied, "callers in the agent's configuration says who may do what", "no"), "uid 990 may not open this volume")
	}
	v := a.volumes[r.GetId()]
	if v == nil {
		v = &nodev1.Volume{Id: r.GetId(), Bytes: 16}
		a.volumes[r.GetId()] = v
	}
	v.Device, v.Mapped = r.GetDevice(), "/dev/mapper/"+r.GetId()
	if !a.old {
		v.Integrity = r.GetIntegrity()
	}
	return &nodev1.OpenResponse{Volume: v}, nil
}

func (a *agent) find(id string) (*nodev1.Volume, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if v := a.volumes[id]; v != nil {
		return v, nil
	}
	return nil, failure.Status(failure.Newf(failure.NotFound, "", "no"), "volume is not configured here")
}

func (a *agent) Close(_ context.Context, r *nodev1.CloseRequest) (*nodev1.CloseResponse, error) {
	v, err := a.find(r.GetId())
	if err == nil {
		v.Mapped = ""
	}
	return &nodev1.CloseResponse{Volume: v}, err
}

func (a *agent) Status(ctx context.Context, r *nodev1.StatusRequest) (*nodev1.StatusResponse, error) {
	if !a.old {
		if err := grpc.SetHeader(ctx, metadata.Pairs(nodev1.FeaturesHeader, nodev1.FeatureIntegrity)); err != nil {
			return nil, err
		}
	}
	v, err := a.find(r.GetId())
	return &nodev1.StatusResponse{Volume: v}, err
}

func (a *agent) Resize(_ context.Context, r *nodev1.ResizeRequest) (*nodev1.ResizeResponse, error) {
	v, err := a.find(r.GetId())
	if err == nil {
		v.Bytes *= 2
	}
	return &nodev1.ResizeResponse{Volume: v}, err
}

// serve returns the socket of an agent, whose end stop waits for.
func serve(dir string) (socket string, a *agent, stop func(), err error) {
	socket, a = filepath.Join(dir, "agent.sock"), &agent{volumes: map[string]*nodev1.Volume{}}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return "", nil, nil, err
	}
	s := grpc.NewServer(grpc.Creds(insecure.NewCredentials()))
	nodev1.RegisterNodeServer(s, a)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	return socket, a, func() { s.Stop(); <-done }, nil
}

func newMapper(t *testing.T, opts cryptmapper.Options) (*cryptmapper.CryptMapper, *agent) {
	t.Helper()
	socket, a, stop, err := serve(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	m, err := cryptmapper.Dial(socket, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m, a
}

func TestADriverOpensGrowsAndClosesAVolume(t *testing.T) {
	m, a := newMapper(t, cryptmapper.Options{Create: true})
	for range 2 { // the second time it is open
		if got, err := m.OpenCryptDevice(t.Context(), "/dev/disk/by-id/x", "pvc-1", false); err != nil || got != "/dev/mapper/pvc-1" {
			t.Fatalf("%q, %v", got, err)
		}
	}
	if r := a.opened[0]; !r.GetFormat() || r.GetFilesystem() != "none" || r.GetDiscards() || r.GetMountPoint() != "" {
		t.Errorf("the agent was asked for %v", r)
	}
	for _, id := range []string{"pvc-1", "/dev/mapper/pvc-1"} {
		if got, err := m.GetDevicePath(id); err != nil || got != "/dev/disk/by-id/x" {
			t.Errorf("%s: %q, %v", id, got, err)
		}
		if got, err := m.ResizeCryptDevice(t.Context(), id); err != nil || got != "/dev/mapper/pvc-1" {
			t.Errorf("%s: %q, %v", id, got, err)
		}
	}
	for _, id := range []string{"pvc-1", "pvc-1", "never-heard-of"} {
		if err := m.CloseCryptDevice(id); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
	if _, err := m.GetDevicePath("pvc-1"); !errors.Is(err, cryptmapper.ErrNotOpen) {
		t.Errorf("when it is closed: %v", err)
	}
	if _, err := m.ResizeCryptDevice(t.Context(), "pvc-1"); !errors.Is(err, cryptmapper.ErrNotOpen) {
		t.Errorf("when it is closed: %v", err)
	}
}

func TestWhatTheAgentDoesNotDoIsAnError(t *testing.T) {
	m, a := newMapper(t, cryptmapper.Options{})
	if _, err := m.OpenCryptDevice(t.Context(), "/dev/y", "pvc-3", true); err != nil || a.opened[0].GetIntegrity() != "hmac-sha256" {
		t.Errorf("integrity: %v, %v", err, a.opened)
	}
	a.opened, a.old = nil, true
	if _, err := m.OpenCryptDevice(t.Context(), "/dev/x", "pvc-1", true); !errors.Is(err, cryptmapper.ErrIntegrity) || len(a.opened) != 0 {
		t.Errorf("integrity: %v, the agent was asked for %v", err, a.opened)
	}
	_, err := m.OpenCryptDevice(t.Context(), "/dev/x", "other-tenant", false)
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), `open volume "other-tenant"`) || !strings.Contains(err.Error(), "(hint: callers in") {
		t.Errorf("refused: %v", err)
	}
	if r := a.opened[0]; r.GetFormat() {
		t.Error("it would have been created")
	}
	// A configured volume is named by its ID alone.
	if _, err := m.OpenCryptDevice(t.Context(), "", "data", false); err != nil {
		t.Fatal(err)
	}
	if r := a.opened[1]; r.GetFilesystem() != "" || r.GetDevice() != "" {
		t.Errorf("a configured volume was described: %v", r)
	}
	if _, err := m.GetDevicePath("pvc-2"); status.Code(err) != codes.NotFound {
		t.Errorf("an unknown one: %v", err)
	}
}

func TestTheDefaultIsTheAgents(t *testing.T) {
	if cryptmapper.DefaultSocket != node.DefaultSocket {
		t.Errorf("it listens on %s", node.DefaultSocket)
	}
}

func TestAnAgentThatIsAwayIsNamed(t *testing.T) {
	m, err := cryptmapper.Dial(filepath.Join(t.TempDir(), "none.sock"), cryptmapper.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := m.OpenCryptDevice(t.Context(), "/dev/x", "pvc-1", false); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "none.sock") {
		t.Errorf("%v", err)
	}
	if err := m.CloseCryptDevice("pvc-1"); err == nil {
		t.Error("it is taken for closed")
	}
}
