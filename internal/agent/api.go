package agent

import (
	"context"
	"encoding/base64"
	"errors"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

// The bounds of the local API.
const (
	maxConnections  = 512
	maxPerUser      = 64
	maxIdle         = 5 * time.Minute
	maxMessage      = 512 << 10 // a header in it
	defaultPageSize = 100
	maxPageSize     = 1000
)

// api serves the local API.
type api struct {
	nodev1.UnimplementedNodeServer
	callers
	life     context.Context // of the agent: what a caller began goes on without him
	volumes  *Volumes
	dataKeys *dataKeys
}

func newNodeServer(life context.Context, v *Volumes, cfg *node.Config, log *slog.Logger) *grpc.Server {
	who := callers{cfg, log}
	s := newLocalServer(who, maxMessage)
	nodev1.RegisterNodeServer(s, &api{callers: who, life: life, volumes: v, dataKeys: newDataKeys(who, v)})
	return s
}

// newLocalServer serves callers on a unix socket that a rule names.
func newLocalServer(who callers, maxMessage int) *grpc.Server {
	return grpc.NewServer(
		grpc.Creds(unixsocket.CallerCredentials(who.admit)),
		grpc.MaxRecvMsgSize(maxMessage),
		// As many as a node has volumes: all of them may wait for the key service, on one
		// connection of a proxy.
		grpc.MaxConcurrentStreams(256),
		grpc.MaxHeaderListSize(8<<10),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.ReadBufferSize(4<<10),
		grpc.WriteBufferSize(4<<10),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: maxIdle}),
		grpc.UnaryInterceptor(func(ctx context.Context, r any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			if err := grpc.SetHeader(ctx, metadata.Pairs(nodev1.FeaturesHeader, nodev1.FeatureIntegrity, nodev1.FeaturesHeader, nodev1.FeatureSource)); err != nil {
				return nil, err
			}
			return handle(ctx, r)
		}),
	)
}

func answer(err error) error {
	if err == nil {
		return nil
	}
	return failure.Status(err, err.Error())
}

// volume is the one that a request means: a configured one by its ID, another one
// by its description, if a rule allows it.
func (a *api) volume(ctx context.Context, r *nodev1.OpenRequest) (v node.Volume, dynamic bool, err error) {
	described := r.GetDevice() != "" || r.GetName() != "" || r.GetFilesystem() != "" || r.GetMountPoint() != "" || len(r.GetOptions()) > 0 || r.GetReadOnly() || r.GetDiscards() || r.GetIntegrity() != "" || r.GetSource() != ""
	v, configured := a.cfg.Volume(r.GetId())
	switch {
	case configured && described:
		return v, false, failure.Newf(failure.Usage, "name its ID alone", "volume %q is configured, and cannot be described", v.ID)
	case configured:
		return v, false, nil
	case !described:
		return v, false, node.UnknownVolume(r.GetId())
	}
	p, _ := unixsocket.PeerOf(ctx)
	v, err = a.cfg.Admit(p.UID, node.Volume{
		ID: r.GetId(), Device: r.GetDevice(), Name: r.GetName(), Filesystem: r.GetFilesystem(), Mount: r.GetMountPoint(),
		Options: r.GetOptions(), ReadOnly: r.GetReadOnly(), Discards: r.GetDiscards(), Integrity: r.GetIntegrity(), Format: r.GetFormat(),
		Source: r.GetSource(),
	})
	return v, true, err
}

func (a *api) open(ctx context.Context, r *nodev1.OpenRequest, tell func(string, time.Duration)) (Volume, error) {
	operation := "open"
	if r.GetFormat() {
		operation = "format"
	}
	if err := a.allow(ctx, operation, r.GetId()); err != nil {
		return Volume{}, err
	}
	if r.GetSource() != "" {
		// What it holds is shown under another name.
		if err := a.allow(ctx, "open", r.GetSource()); err != nil {
			return Volume{}, err
		}
	}
	v, dynamic, err := a.volume(ctx, r)
	if err != nil {
		return Volume{}, answer(err)
	}
	// The caller may go away; a format that has begun is finished.
	work := a.life
	if tell != nil {
		work = WithProgress(work, tell)
	}
	out, err := a.volumes.Open(work, v, Intent{Format: r.GetFormat(), Dynamic: dynamic})
	return out, answer(err)
}

// Open implements the API.
func (a *api) Open(ctx context.Context, r *nodev1.OpenRequest) (*nodev1.OpenResponse, error) {
	v, err := a.open(ctx, r, nil)
	return &nodev1.OpenResponse{Volume: Message(v), Created: v.Created}, err
}

// OpenProgress implements the API.
func (a *api) OpenProgress(r *nodev1.OpenRequest, stream grpc.ServerStreamingServer[nodev1.OpenEvent]) error {
	events := make(chan *nodev1.OpenEvent, 64)
	done := make(chan error, 1)
	var v Volume
	go func() {
		defer close(events)
		var err error
		v, err = a.open(stream.Context(), r, func(step string, took time.Duration) {
			select {
			case events <- &nodev1.OpenEvent{Step: step, TookMs: uint64(took.Milliseconds())}:
			default: // the caller does not read; the work does not wait for it
			}
		})
		done <- err
	}()
	for e := range events {
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	if err := <-done; err != nil {
		return err
	}
	return stream.Send(&nodev1.OpenEvent{Step: "done", Volume: Message(v)})
}

// act is a call on one volume that is known.
func (a *api) act(ctx context.Context, operation, id string, do func(context.Context, string) (Volume, error)) (*nodev1.Volume, error) {
	if err := a.allow(ctx, operation, id); err != nil {
		return nil, err
	}
	v, err := do(ctx, id)
	return Message(v), answer(err)
}

// goOn is do, to its end, also if the caller goes away.
func (a *api) goOn(do func(context.Context, string) (Volume, error)) func(context.Context, string) (Volume, error) {
	return func(_ context.Context, id string) (Volume, error) { return do(a.life, id) }
}

// Close implements the API.
func (a *api) Close(ctx context.Context, r *nodev1.CloseRequest) (*nodev1.CloseResponse, error) {
	f := a.volumes.Close
	if r.GetGiveBack() {
		f = a.volumes.GiveBack
	}
	v, err := a.act(ctx, "close", r.GetId(), a.goOn(f))
	return &nodev1.CloseResponse{Volume: v}, err
}

// Status implements the API.
func (a *api) Status(ctx context.Context, r *nodev1.StatusRequest) (*nodev1.StatusResponse, error) {
	v, err := a.act(ctx, "status", r.GetId(), a.volumes.Status)
	return &nodev1.StatusResponse{Volume: v}, err
}

// Resize implements the API.
func (a *api) Resize(ctx context.Context, r *nodev1.ResizeRequest) (*nodev1.ResizeResponse, error) {
	v, err := a.act(ctx, "resize", r.GetId(), a.goOn(a.volumes.Resize))
	return &nodev1.ResizeResponse{Volume: v}, err
}

// Suspend implements the API.
func (a *api) Suspend(ctx context.Context, r *nodev1.SuspendRequest) (*nodev1.SuspendResponse, error) {
	v, err := a.act(ctx, "suspend", r.GetId(), a.goOn(a.volumes.Suspend))
	return &nodev1.SuspendResponse{Volume: v}, err
}

// Resume implements the API.
func (a *api) Resume(ctx context.Context, r *nodev1.ResumeRequest) (*nodev1.ResumeResponse, error) {
	v, err := a.act(ctx, "resume", r.GetId(), a.goOn(a.volumes.Resume))
	return &nodev1.ResumeResponse{Volume: v}, err
}

// Rotate implements the API.
func (a *api) Rotate(ctx context.Context, r *nodev1.RotateRequest) (*nodev1.RotateResponse, error) {
	v, err := a.act(ctx, "rotate", r.GetId(), a.goOn(a.volumes.Rotate))
	return &nodev1.RotateResponse{Volume: v}, err
}

// BackupHeader implements the API.
func (a *api) BackupHeader(ctx context.Context, r *nodev1.BackupHeaderRequest) (*nodev1.BackupHeaderResponse, error) {
	if err := a.allow(ctx, "backup-header", r.GetId()); err != nil {
		return nil, err
	}
	h, err := a.volumes.BackupHeader(ctx, r.GetId())
	return &nodev1.BackupHeaderResponse{Header: h}, answer(err)
}

// RestoreHeader implements the API.
func (a *api) RestoreHeader(ctx context.Context, r *nodev1.RestoreHeaderRequest) (*nodev1.RestoreHeaderResponse, error) {
	v, err := a.act(ctx, "restore-header", r.GetId(), a.goOn(func(ctx context.Context, id string) (Volume, error) {
		return a.volumes.RestoreHeader(ctx, id, r.GetHeader())
	}))
	return &nodev1.RestoreHeaderResponse{Volume: v}, err
}

// Retire implements the API.
func (a *api) Retire(ctx context.Context, r *nodev1.RetireRequest) (*nodev1.RetireResponse, error) {
	v, err := a.act(ctx, "retire", r.GetId(), a.goOn(a.volumes.Retire))
	return &nodev1.RetireResponse{Volume: v}, err
}

// GetDataKey implements the API.
func (a *api) GetDataKey(ctx context.Context, r *nodev1.GetDataKeyRequest) (*nodev1.GetDataKeyResponse, error) {
	key, err := a.dataKeys.get(ctx, r.GetVolumeId(), r.GetLength())
	return &nodev1.GetDataKeyResponse{DataKey: key}, err
}

var errPageToken = errors.New("page_token is not one that this API gave")

// List implements the API. A page holds what the caller may see.
func (a *api) List(ctx context.Context, r *nodev1.ListRequest) (*nodev1.ListResponse, error) {
	if err := a.allow(ctx, "list", ""); err != nil {
		return nil, err
	}
	after, err := base64.RawURLEncoding.DecodeString(r.GetPageToken())
	if err != nil || len(after) > 128 {
		return nil, answer(failure.New(failure.Usage, errPageToken, "leave it out to begin anew"))
	}
	size := int(min(r.GetPageSize(), maxPageSize))
	if size == 0 {
		size = defaultPageSize
	}
	page, more := a.volumes.List(ctx, string(after), size)
	resp := &nodev1.ListResponse{}
	for _, v := range page {
		if a.mayList(ctx, v.ID) {
			resp.Volumes = append(resp.Volumes, Message(v))
		}
	}
	if more {
		resp.NextPageToken = base64.RawURLEncoding.EncodeToString([]byte(page[len(page)-1].ID))
	}
	return resp, nil
}

// mayList is allow without a word in the log: what a caller may not see is left out.
func (a *api) mayList(ctx context.Context, id string) bool {
	p, ok := unixsocket.PeerOf(ctx)
	return ok && a.cfg.Allows(p, "list", id)
}

// Message is a volume as the local API shows it.
func Message(v Volume) *nodev1.Volume {
	return &nodev1.Volume{
		Id: v.ID, Device: v.Device, Mapped: v.Mapped, MountPoint: v.Mount, State: string(v.State),
		LuksUuid: v.UUID, Generation: v.Generation, LastError: v.LastError, CorrelationId: v.CorrelationID, Optional: v.Optional,
		Bytes: uint64(v.Bytes), ReadOnly: v.ReadOnly, Lease: v.Lease, Warnings: v.Warnings, KeyVersion: v.KeyVersion, Dynamic: v.Dynamic, OnRequest: v.OnRequest,
		Integrity: v.Integrity, Progress: v.Progress,
	}
}

// listenUnix makes the socket. Who may call is decided by SO_PEERCRED, so that a
// refusal can be logged.
func listenUnix(path string) (net.Listener, error) {
	l, err := unixsocket.Listen(path, unixsocket.Options{Mode: 0o666, UID: -1, GID: -1})
	if err != nil {
		return nil, err
	}
	return unixsocket.Bounded(l, maxConnections, maxPerUser), nil
}

// LocalCredentials are what a caller of the local API dials with.
func LocalCredentials() credentials.TransportCredentials { return unixsocket.Credentials(nil) }
