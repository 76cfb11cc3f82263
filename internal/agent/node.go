package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

// node serves the local API.
type node struct {
	nodev1.UnimplementedNodeServer
	manager *Manager
	callers []Caller
	log     *slog.Logger
}

func newNodeServer(m *Manager, callers []Caller, log *slog.Logger) *grpc.Server {
	s := grpc.NewServer(
		grpc.Creds(unixsocket.Credentials(nil)),
		grpc.MaxRecvMsgSize(64<<10),
		grpc.MaxConcurrentStreams(16),
		grpc.ConnectionTimeout(10*time.Second),
	)
	nodev1.RegisterNodeServer(s, &node{manager: m, callers: callers, log: log})
	return s
}

// allow decides by the kernel's word on the caller.
func (n *node) allow(ctx context.Context, operation, volume string) error {
	p, ok := unixsocket.PeerOf(ctx)
	if !ok {
		return n.answer(ctx, failure.Newf(failure.PolicyDenied, "", "the caller is unknown"))
	}
	for _, c := range n.callers {
		if *c.UID == p.UID && slices.Contains(c.Operations, operation) &&
			(volume == "" || slices.ContainsFunc(c.Volumes, func(pattern string) bool { return policy.Match(pattern, volume) })) {
			return nil
		}
	}
	n.log.Warn("local caller refused", "uid", p.UID, "pid", p.PID, "operation", operation, "volume", fmt.Sprintf("%.128q", volume))
	return failure.Status(failure.Newf(failure.PolicyDenied, "callers in the agent's configuration says who may do what", "refused"),
		fmt.Sprintf("uid %d may not %s this volume", p.UID, operation))
}

func (n *node) answer(_ context.Context, err error) error {
	if err == nil {
		return nil
	}
	return failure.Status(err, err.Error())
}

func (n *node) Open(ctx context.Context, r *nodev1.OpenRequest) (*nodev1.OpenResponse, error) {
	operation := "open"
	if r.GetFormat() {
		operation = "format"
	}
	if err := n.allow(ctx, operation, r.GetId()); err != nil {
		return nil, err
	}
	// The caller may go away; a format that has begun is finished.
	v, err := n.manager.Open(context.WithoutCancel(ctx), r.GetId(), r.GetFormat())
	return &nodev1.OpenResponse{Volume: Message(v)}, n.answer(ctx, err)
}

func (n *node) Close(ctx context.Context, r *nodev1.CloseRequest) (*nodev1.CloseResponse, error) {
	if err := n.allow(ctx, "close", r.GetId()); err != nil {
		return nil, err
	}
	v, err := n.manager.Close(ctx, r.GetId())
	return &nodev1.CloseResponse{Volume: Message(v)}, n.answer(ctx, err)
}

func (n *node) Status(ctx context.Context, r *nodev1.StatusRequest) (*nodev1.StatusResponse, error) {
	if err := n.allow(ctx, "status", r.GetId()); err != nil {
		return nil, err
	}
	v, err := n.manager.Status(ctx, r.GetId())
	return &nodev1.StatusResponse{Volume: Message(v)}, n.answer(ctx, err)
}

func (n *node) List(ctx context.Context, _ *nodev1.ListRequest) (*nodev1.ListResponse, error) {
	if err := n.allow(ctx, "list", ""); err != nil {
		return nil, err
	}
	resp := &nodev1.ListResponse{}
	for _, v := range n.manager.List(ctx) {
		if n.allow(ctx, "list", v.ID) == nil {
			resp.Volumes = append(resp.Volumes, Message(v))
		}
	}
	return resp, nil
}

// Message is a volume as the local API shows it.
func Message(v Volume) *nodev1.Volume {
	return &nodev1.Volume{
		Id: v.ID, Device: v.Device, Mapped: v.Mapped, MountPoint: v.Mount, State: v.State,
		LuksUuid: v.UUID, Generation: v.Generation, LastError: v.LastError, CorrelationId: v.CorrelationID, Optional: v.Optional,
	}
}

// listenUnix makes the socket. Who may call is decided by SO_PEERCRED, so that a
// refusal can be logged.
func listenUnix(path string) (*net.UnixListener, error) {
	return unixsocket.Listen(path, unixsocket.Options{Mode: 0o666, UID: -1, GID: -1})
}

// LocalCredentials are what a caller of the local API dials with.
func LocalCredentials() credentials.TransportCredentials { return unixsocket.Credentials(nil) }
