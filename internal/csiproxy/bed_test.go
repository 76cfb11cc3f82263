package csiproxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/unixsocket"
	"github.com/keyagent/keyagent/test/sim/csidriver"
)

// agent is one that says yes, unless its test says otherwise.
type agent struct {
	nodev1.UnimplementedNodeServer
	mu      sync.Mutex
	calls   []proto.Message
	volumes map[string]*nodev1.Volume
	open    func(*nodev1.OpenRequest, func(string)) error
	close   error
	resize  error
	old     bool // it knows no features
}

func (a *agent) seen(m proto.Message) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls = append(a.calls, m)
}

func (a *agent) asked() []proto.Message {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := a.calls
	a.calls = nil
	return out
}

func (a *agent) OpenProgress(r *nodev1.OpenRequest, s grpc.ServerStreamingServer[nodev1.OpenEvent]) error {
	a.seen(r)
	if a.open != nil {
		if err := a.open(r, func(step string) { _ = s.Send(&nodev1.OpenEvent{Step: step}) }); err != nil {
			return err
		}
	}
	v := &nodev1.Volume{Id: r.GetId(), Device: r.GetDevice(), State: "open", Mapped: "/dev/null", MountPoint: r.GetMountPoint(), ReadOnly: r.GetReadOnly(), Bytes: 1 << 20}
	a.mu.Lock()
	a.volumes[r.GetId()] = v
	a.mu.Unlock()
	return s.Send(&nodev1.OpenEvent{Step: "done", Volume: v})
}

func (a *agent) Status(ctx context.Context, r *nodev1.StatusRequest) (*nodev1.StatusResponse, error) {
	if !a.old {
		if err := grpc.SetHeader(ctx, metadata.Pairs(nodev1.FeaturesHeader, nodev1.FeatureIntegrity, nodev1.FeaturesHeader, nodev1.FeatureSource)); err != nil {
			return nil, err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	v, ok := a.volumes[r.GetId()]
	if !ok {
		return nil, failure.Status(failure.Newf(failure.NotFound, "", "no volume"), "no volume")
	}
	return &nodev1.StatusResponse{Volume: v}, nil
}

func (a *agent) Close(_ context.Context, r *nodev1.CloseRequest) (*nodev1.CloseResponse, error) {
	a.seen(r)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.close == nil {
		delete(a.volumes, r.GetId())
	}
	return &nodev1.CloseResponse{}, a.close
}

func (a *agent) Resize(_ context.Context, r *nodev1.ResizeRequest) (*nodev1.ResizeResponse, error) {
	a.seen(r)
	return &nodev1.ResizeResponse{Volume: &nodev1.Volume{Bytes: 3 << 20}}, a.resize
}

// mounts are those of no kernel.
type mounts struct {
	mu   sync.Mutex
	at   map[string]string
	gone bool
	held []string
}

func (m *mounts) Holders(uint64) []string { return m.held }

func (m *mounts) BindFolder(from string, _ uint64, to string, options []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.at[to] = from + " " + strings.Join(options, ",")
	return nil
}

func (m *mounts) BindDevice(from string, _ uint64, to string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.at[to] = from
	return nil
}

func (m *mounts) Clear(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.at, path)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (m *mounts) Device(path string) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, err := os.Stat(path); err != nil || m.gone {
		return 0, nil
	}
	return 1, nil
}

func (m *mounts) Points(uint64) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Keys(m.at)), nil
}

func (*mounts) Remove(dir string) error { return os.RemoveAll(dir) }

func (*mounts) Number(string) uint64 { return 7 }

// bed is a proxy with all that is around it.
type bed struct {
	*Proxy
	cfg    *Config
	agent  *agent
	driver *csidriver.Driver
	mounts *mounts
	node   csi.NodeClient
	conn   *grpc.ClientConn
	stage  string
	target string
}

func must[T any](t testing.TB, v T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func serve(t *testing.T, s *grpc.Server, l net.Listener, path string, creds grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	go func() { _ = s.Serve(l) }()
	conn := must(t, err2(grpc.NewClient("unix:"+path, creds)), nil)
	t.Cleanup(func() { _ = conn.Close(); s.Stop() })
	return conn
}

func err2[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newBed(t *testing.T, change func(*Config)) *bed { return newImpatientBed(t, 0, change) }

func newImpatientBed(t *testing.T, patience time.Duration, change func(*Config)) *bed {
	t.Helper()
	dir := t.TempDir()
	b := &bed{
		cfg:    &Config{Kubelet: dir, Private: filepath.Join(dir, "p"), Prefix: "csi-", Filesystem: "ext4", Listen: filepath.Join(dir, "proxy.sock")},
		agent:  &agent{volumes: map[string]*nodev1.Volume{}},
		driver: &csidriver.Driver{Name: "test.example", Can: []csi.NodeServiceCapability_RPC_Type{csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME}},
		mounts: &mounts{at: map[string]string{}},
		stage:  filepath.Join(dir, "stage"), target: filepath.Join(dir, "target"),
	}
	b.driver.Publish = func(r *csi.NodePublishVolumeRequest) error { return os.WriteFile(r.GetTargetPath(), nil, 0o600) }
	if change != nil {
		change(b.cfg)
	}
	plain := grpc.WithTransportCredentials(insecure.NewCredentials())
	at := func(name string) (net.Listener, string) {
		path := filepath.Join(dir, name)
		return must(t, err2(net.Listen("unix", path)), nil), path
	}
	server := grpc.NewServer()
	nodev1.RegisterNodeServer(server, b.agent)
	al, ap := at("agent")
	agentConn := serve(t, server, al, ap, plain)
	dl, dp := at("driver")
	driverConn := serve(t, b.driver.Server(), dl, dp, plain)
	life, end := context.WithCancel(context.Background())
	t.Cleanup(end)
	b.Proxy = New(life, Options{Config: b.cfg, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Mounts: b.mounts, Agent: agentConn, Driver: driverConn, Patience: patience})
	b.conn = serve(t, b.Server(), must(t, err2(Listen(b.cfg.Listen)), nil), b.cfg.Listen, grpc.WithTransportCredentials(unixsocket.Credentials(nil)))
	b.node = csi.NewNodeClient(b.conn)
	return b
}

func mode(m csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability_AccessMode {
	return &csi.VolumeCapability_AccessMode{Mode: m}
}

const once = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER

func filesystem(m csi.VolumeCapability_AccessMode_Mode, fs string, flags ...string) *csi.VolumeCapability {
	return &csi.VolumeCapability{AccessMode: mode(m), AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fs, MountFlags: flags}}}
}

func block(m csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{AccessMode: mode(m), AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}}
}

func (b *bed) stageIt(c *csi.VolumeCapability, context ...string) error {
	r := &csi.NodeStageVolumeRequest{VolumeId: "v", StagingTargetPath: b.stage, VolumeCapability: c, Secrets: map[string]string{"password": "hunter2"}, PublishContext: map[string]string{"lun": "3"}}
	for i := 0; i < len(context); i += 2 {
		r.VolumeContext = map[string]string{context[i]: context[i+1]}
	}
	_, err := b.node.NodeStageVolume(ctx(), r)
	return err
}

func (b *bed) publishIt(c *csi.VolumeCapability, readOnly bool) error {
	_, err := b.node.NodePublishVolume(ctx(), &csi.NodePublishVolumeRequest{VolumeId: "v", StagingTargetPath: b.stage, TargetPath: b.target, VolumeCapability: c, Readonly: readOnly})
	return err
}

func (b *bed) unstageIt() error {
	_, err := b.node.NodeUnstageVolume(ctx(), &csi.NodeUnstageVolumeRequest{VolumeId: "v", StagingTargetPath: b.stage})
	return err
}

func ctx() context.Context { return context.Background() }

// names are those of messages.
func names(all []proto.Message) string {
	var out []string
	for _, m := range all {
		if n := string(m.ProtoReflect().Descriptor().Name()); n != "NodeGetCapabilitiesRequest" {
			out = append(out, strings.TrimSuffix(n, "Request"))
		}
	}
	return strings.Join(out, " ")
}

func wantCode(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("%v, want %v", err, code)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v does not say %q", err, w)
		}
	}
}
