package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/internal/agent"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/node"
)

// volumes is what both a running agent and this process alone can do.
type volumes interface {
	open(ctx context.Context, r *nodev1.OpenRequest) (*nodev1.Volume, error)
	openAll(ctx context.Context) ([]opened, error)
	close(ctx context.Context, id string, giveBack bool) (*nodev1.Volume, error)
	closeAll(ctx context.Context) error
	status(ctx context.Context, id string) (*nodev1.Volume, error)
	list(ctx context.Context) ([]*nodev1.Volume, error)
	resize(ctx context.Context, id string) (*nodev1.Volume, error)
	suspend(ctx context.Context, id string) (*nodev1.Volume, error)
	resume(ctx context.Context, id string) (*nodev1.Volume, error)
	rotate(ctx context.Context, id string) (*nodev1.Volume, error)
	retire(ctx context.Context, id string) (*nodev1.Volume, error)
	backupHeader(ctx context.Context, id string) ([]byte, error)
	restoreHeader(ctx context.Context, id string, header []byte) (*nodev1.Volume, error)
}

// opened is what became of one volume of several.
type opened struct {
	id       string
	optional bool
	volume   *nodev1.Volume
	err      error
}

// local works without an agent.
type local struct {
	cfg *node.Config
	v   *agent.Volumes
}

func (l *local) open(ctx context.Context, r *nodev1.OpenRequest) (*nodev1.Volume, error) {
	v, configured := l.cfg.Volume(r.GetId())
	switch {
	case configured && r.GetDevice() != "":
		return nil, failure.Newf(failure.Usage, "leave out --device", "volume %q is configured", r.GetId())
	case !configured && r.GetDevice() == "":
		return nil, node.UnknownVolume(r.GetId())
	case !configured:
		v = node.Volume{ID: r.GetId(), Device: r.GetDevice(), Name: r.GetName(), Filesystem: r.GetFilesystem(), Mount: r.GetMountPoint(),
			Options: r.GetOptions(), ReadOnly: r.GetReadOnly(), Discards: r.GetDiscards(), Integrity: r.GetIntegrity(), Source: r.GetSource()}
	}
	defer l.leases(ctx)()
	out, err := l.v.Open(ctx, v, agent.Intent{Format: r.GetFormat(), Dynamic: !configured})
	return alone(out), err
}

// provision creates a configured volume from an image, or opens it if it exists.
func (l *local) provision(ctx context.Context, id string, from *node.Image) (*nodev1.Volume, error) {
	v, ok := l.cfg.Volume(id)
	if !ok {
		return nil, node.UnknownVolume(id)
	}
	in := agent.Intent{Format: true}
	if *from != (node.Image{}) {
		in.From = from
	} else if v.From == nil {
		return nil, failure.Newf(failure.Usage, "--from names an image, and so does from in the configuration", "volume %q begins with no image", id)
	}
	defer l.leases(ctx)()
	out, err := l.v.Open(ctx, v, in)
	return alone(out), err
}

// leases keeps the leases of volumes that are being opened, which takes long where one is
// created. stop ends that.
func (l *local) leases(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	go l.v.KeepLeases(ctx)
	return cancel
}

// alone is a volume that this process opened and will not look after.
func alone(v agent.Volume) *nodev1.Volume {
	m := agent.Message(v)
	if v.Lease == "bound" {
		m.Warnings = append(m.Warnings, "its lease ends soon, and no agent renews it: start keyagent agent, or another node may write the volume")
	}
	return m
}

func (l *local) openAll(ctx context.Context) ([]opened, error) {
	defer l.leases(ctx)()
	wait, err := l.v.OpenAll(ctx, l.cfg.Volumes)
	wait()
	var out []opened
	for _, v := range l.cfg.Volumes {
		if v.OnRequest {
			continue
		}
		o := opened{id: v.ID, optional: v.Optional, err: l.v.LastError(v.ID)}
		one, statusErr := l.v.Status(ctx, v.ID)
		if o.err == nil {
			o.err = statusErr
		}
		o.volume = alone(one)
		out = append(out, o)
	}
	if err != nil && !slices.ContainsFunc(out, func(o opened) bool { return o.err != nil && !o.optional }) {
		return nil, err
	}
	return out, nil
}

func (l *local) closeAll(ctx context.Context) error { return l.v.CloseAll(ctx) }

func (l *local) close(ctx context.Context, id string, giveBack bool) (*nodev1.Volume, error) {
	if giveBack {
		return message(l.v.GiveBack(ctx, id))
	}
	return message(l.v.Close(ctx, id))
}

func (l *local) status(ctx context.Context, id string) (*nodev1.Volume, error) {
	return message(l.v.Status(ctx, id))
}

func (l *local) list(ctx context.Context) ([]*nodev1.Volume, error) {
	var out []*nodev1.Volume
	const all = 1 << 20
	page, _ := l.v.List(ctx, "", all)
	for _, v := range page {
		out = append(out, agent.Message(v))
	}
	return out, nil
}

func (l *local) resize(ctx context.Context, id string) (*nodev1.Volume, error) {
	return message(l.v.Resize(ctx, id))
}

func (l *local) rotate(ctx context.Context, id string) (*nodev1.Volume, error) {
	return message(l.v.Rotate(ctx, id))
}

func (l *local) retire(ctx context.Context, id string) (*nodev1.Volume, error) {
	return message(l.v.Retire(ctx, id))
}

func (l *local) suspend(ctx context.Context, id string) (*nodev1.Volume, error) {
	return message(l.v.Suspend(ctx, id))
}

func (l *local) resume(ctx context.Context, id string) (*nodev1.Volume, error) {
	return message(l.v.Resume(ctx, id))
}

func (l *local) backupHeader(ctx context.Context, id string) ([]byte, error) {
	return l.v.BackupHeader(ctx, id)
}

func (l *local) restoreHeader(ctx context.Context, id string, header []byte) (*nodev1.Volume, error) {
	return message(l.v.RestoreHeader(ctx, id, header))
}

func message(v agent.Volume, err error) (*nodev1.Volume, error) { return agent.Message(v), err }

// remote asks a running agent.
type remote struct{ c nodev1.NodeClient }

func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(agent.LocalCredentials()), grpc.WithNoProxy(),
		// An agent that is frozen keeps nobody waiting for ever. Servers allow a question in
		// five minutes.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 6 * time.Minute, Timeout: time.Minute}))
}

// dialAgent is how the one-shot verbs reach the agent.
func dialAgent(socket string) (volumes, func(), error) {
	conn, err := dial(socket)
	if err != nil {
		return nil, nil, err
	}
	return remote{nodev1.NewNodeClient(conn)}, func() { _ = conn.Close() }, nil
}

func (r remote) open(ctx context.Context, req *nodev1.OpenRequest) (*nodev1.Volume, error) {
	resp, err := r.c.Open(ctx, req)
	return resp.GetVolume(), fromAgent(err)
}

// openAll asks for what the agent has configured. It knows the order, and a volume
// that needs another is asked for again when that is up.
func (r remote) openAll(ctx context.Context) ([]opened, error) {
	all, err := r.list(ctx)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(all, func(a, b *nodev1.Volume) int { return len(a.GetMountPoint()) - len(b.GetMountPoint()) })
	var out []opened
	for _, one := range all {
		if one.GetDynamic() || one.GetOnRequest() {
			continue
		}
		o := opened{id: one.GetId(), optional: one.GetOptional()}
		o.volume, o.err = r.open(ctx, &nodev1.OpenRequest{Id: one.GetId()})
		out = append(out, o)
	}
	return out, nil
}

func (r remote) close(ctx context.Context, id string, giveBack bool) (*nodev1.Volume, error) {
	resp, err := r.c.Close(ctx, &nodev1.CloseRequest{Id: id, GiveBack: giveBack})
	return resp.GetVolume(), fromAgent(err)
}

// closeAll closes volumes until none is left that can be closed: one that is
// mounted inside another keeps that one open.
func (r remote) closeAll(ctx context.Context) error {
	all, err := r.list(ctx)
	if err != nil {
		return err
	}
	slices.SortStableFunc(all, func(a, b *nodev1.Volume) int { return len(b.GetMountPoint()) - len(a.GetMountPoint()) })
	var first error
	for _, v := range all {
		if v.GetState() == string(agent.Absent) {
			continue
		}
		if _, err := r.close(ctx, v.GetId(), false); err != nil && first == nil {
			f := failure.Of(err)
			first = &failure.Error{Class: f.Class, Hint: f.Hint, Err: fmt.Errorf("volume %q: %w", v.GetId(), err)}
		}
	}
	return first
}

func (r remote) status(ctx context.Context, id string) (*nodev1.Volume, error) {
	resp, err := r.c.Status(ctx, &nodev1.StatusRequest{Id: id})
	return resp.GetVolume(), fromAgent(err)
}

func (r remote) list(ctx context.Context) ([]*nodev1.Volume, error) {
	var out []*nodev1.Volume
	req := &nodev1.ListRequest{}
	for {
		resp, err := r.c.List(ctx, req)
		if err != nil {
			return nil, fromAgent(err)
		}
		out = append(out, resp.GetVolumes()...)
		if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
			return out, nil
		}
	}
}

func (r remote) resize(ctx context.Context, id string) (*nodev1.Volume, error) {
	resp, err := r.c.Resize(ctx, &nodev1.ResizeRequest{Id: id})
	return resp.GetVolume(), fromAgent(err)
}

func (r remote) rotate(ctx context.Context, id string) (*nodev1.Volume, error) {
	resp, err := r.c.Rotate(ctx, &nodev1.RotateRequest{Id: id})
	return resp.GetVolume(), fromAgent(err)
}

func (r remote) retire(ctx context.Context, id string) (*nodev1.Volume, error) {
	resp, err := r.c.Retire(ctx, &nodev1.RetireRequest{Id: id})
	return resp.GetVolume(), fromAgent(err)
}

func (r remote) suspend(ctx context.Context, id string) (*nodev1.Volume, error) {
	resp, err := r.c.Suspend(ctx, &nodev1.SuspendRequest{Id: id})
	return resp.GetVolume(), fromAgent(err)
}

func (r remote) resume(ctx context.Context, id string) (*nodev1.Volume, error) {
	resp, err := r.c.Resume(ctx, &nodev1.ResumeRequest{Id: id})
	return resp.GetVolume(), fromAgent(err)
}

func (r remote) backupHeader(ctx context.Context, id string) ([]byte, error) {
	resp, err := r.c.BackupHeader(ctx, &nodev1.BackupHeaderRequest{Id: id})
	return resp.GetHeader(), fromAgent(err)
}

func (r remote) restoreHeader(ctx context.Context, id string, header []byte) (*nodev1.Volume, error) {
	resp, err := r.c.RestoreHeader(ctx, &nodev1.RestoreHeaderRequest{Id: id, Header: header})
	return resp.GetVolume(), fromAgent(err)
}

func fromAgent(err error) error {
	if err == nil {
		return nil
	}
	err = failure.FromStatus(err)
	if f := failure.Of(err); f.Class == failure.Unreachable && f.Hint == "" {
		// A user whom no rule names is not let in, and hears nothing.
		return &failure.Error{Class: f.Class, Err: fmt.Errorf("agent: %w", err), Hint: "is the agent stopping, or does callers in the agent's configuration name this user?"}
	}
	return err
}
