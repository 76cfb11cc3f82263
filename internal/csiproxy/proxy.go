package csiproxy

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

// Mounter is what the proxy does to the mounts of its node.
type Mounter interface {
	// BindFolder shows what is mounted on from, which is device, on the folder to as well,
	// with options. It succeeds if it does so already.
	BindFolder(from string, device uint64, to string, options []string) error
	// BindDevice shows the block device at from, which is device, as the file to.
	BindDevice(from string, device uint64, to string) error
	// Clear unmounts all that is mounted on a path, and removes the empty folder or file.
	// It succeeds if there is nothing.
	Clear(path string) error
	// Device returns the number of the block device at a path that is not a link, 0 if
	// there is no device or the kernel has it no more.
	Device(path string) (uint64, error)
	// Number returns the number of the block device that a path leads to, 0 if to none.
	Number(path string) uint64
	// Holders names the devices that lie on a device.
	Holders(device uint64) []string
	// Points are the paths at which a device is shown.
	Points(device uint64) ([]string, error)
	// Remove removes a folder and what is in it, unless something is mounted there.
	Remove(dir string) error
}

// Options configure [New].
type Options struct {
	Config *Config
	Log    *slog.Logger
	Mounts Mounter
	// Agent and Driver are connections to both. The driver's is asked with the codec of
	// its own messages.
	Agent  grpc.ClientConnInterface
	Driver grpc.ClientConnInterface
	// Patience is how long driver and agent may take for one call; default five minutes.
	// Kubelet itself waits for less, and asks again. Opening is not bounded: a volume may be
	// created.
	Patience time.Duration
}

// bounded is somebody who may hang.
type bounded struct {
	grpc.ClientConnInterface
	patience time.Duration
}

// Invoke implements [grpc.ClientConnInterface].
func (b bounded) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(ctx, b.patience)
	defer cancel()
	return b.ClientConnInterface.Invoke(ctx, method, args, reply, opts...)
}

// Proxy is a CSI driver in front of another one.
type Proxy struct {
	csi.UnimplementedNodeServer
	cfg    *Config
	log    *slog.Logger
	mounts Mounter
	agent  nodev1.NodeClient
	conn   grpc.ClientConnInterface
	driver csi.NodeClient
	work   operations
	// refused is why kubelet did not register the driver.
	refused chan error
}

// New returns a proxy. What a caller began goes on without him, until life ends.
func New(life context.Context, o Options) *Proxy {
	patience := cmp.Or(o.Patience, 5*time.Minute)
	driver := bounded{o.Driver, patience}
	return &Proxy{
		cfg: o.Config, log: o.Log, mounts: o.Mounts, agent: nodev1.NewNodeClient(bounded{o.Agent, patience}), conn: driver, driver: csi.NewNodeClient(driver),
		work: operations{life: life, log: o.Log, running: map[string]*operation{}}, refused: make(chan error, 1),
	}
}

// Dial connects to a unix socket, when it is first used.
func Dial(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// The bounds of the socket. Kubelet and the sidecars are its callers.
const (
	maxConnections = 64
	maxStreams     = 256
)

// Server returns a server of kubelet's side, for this user and root alone.
func (p *Proxy) Server() *grpc.Server {
	s := grpc.NewServer(
		grpc.Creds(unixsocket.Credentials(p.admit)),
		grpc.ForceServerCodecV2(codec()),
		grpc.UnknownServiceHandler(p.forward),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(10*time.Second),
	)
	csi.RegisterNodeServer(s, p)
	return s
}

func (p *Proxy) admit(peer unixsocket.Peer) error {
	if peer.UID == 0 || int(peer.UID) == os.Geteuid() {
		return nil
	}
	p.log.Warn("local caller refused", "uid", peer.UID, "pid", peer.PID)
	return fmt.Errorf("uid %d may not call", peer.UID)
}

// Listen makes kubelet's socket.
func Listen(path string) (net.Listener, error) {
	l, err := unixsocket.Listen(path, unixsocket.Options{UID: -1, GID: -1})
	if err != nil {
		return nil, err
	}
	return unixsocket.Bounded(l, maxConnections, maxConnections), nil
}
