package agent

import (
	"bytes"
	"context"
	"log/slog"
	"time"

	"google.golang.org/grpc"

	constellation "github.com/keyagent/keyagent/api/constellation/kms"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/internal/unixsocket"
	"github.com/keyagent/keyagent/kms"
)

// domainDataKey tells the records of keys that leave the agent from all others.
const domainDataKey = "keyagent data key confirmation v1"

const (
	// maxDataKeys bounds the requests that wait for the key service.
	maxDataKeys = 32
	// dataKeyTimeout bounds one of them, whatever its caller is ready to wait.
	dataKeyTimeout = 2 * time.Minute
)

// dataKeys gives keys to callers that insist on having one. They open no disk that this
// agent, or another, opens: a key of that kind never leaves.
type dataKeys struct {
	callers
	volumes *Volumes
	slots   chan struct{}
}

func newDataKeys(who callers, v *Volumes) *dataKeys {
	return &dataKeys{who, v, make(chan struct{}, maxDataKeys)}
}

// get decides, and returns the key in memory that nobody wipes: gRPC sends it later.
func (d *dataKeys) get(ctx context.Context, id string, length uint32) ([]byte, error) {
	if err := d.decide(ctx, id, length); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dataKeyTimeout)
	defer cancel()
	select {
	case d.slots <- struct{}{}:
		defer func() { <-d.slots }()
	case <-ctx.Done():
		return nil, answer(failure.New(failure.Unreachable, ctx.Err(), "too many callers wait for the key service"))
	}
	defer d.volumes.Keys.Hold()()
	one := &keyclient.Diskless{Keys: d.volumes.Keys, Volume: id, Domain: domainDataKey, Length: int(length)}
	key, err := one.Obtain(ctx)
	if err != nil {
		d.log.Warn("no data key", "volume", id, "error", err, "class", failure.Of(err).Class)
		return nil, answer(err)
	}
	defer key.Close()
	var out []byte
	err = key.DEK.Use(func(b []byte) error { out = bytes.Clone(b); return nil })
	d.log.Info("data key given", "volume", id, "length", length, "correlation_id", key.CorrelationID)
	return out, answer(err)
}

// decide refuses what is no ID or no length before anything else looks at it.
func (d *dataKeys) decide(ctx context.Context, id string, length uint32) error {
	p, _ := unixsocket.PeerOf(ctx)
	switch _, configured := d.cfg.Volume(id); {
	case !policy.ValidVolume(id):
		return d.refuse(p, node.GetDataKey, id, failure.Newf(failure.Usage, "", "the name of a key has 1 to 128 letters, digits, dots, dashes and underscores, and begins with a letter or digit"))
	case length < kms.MinLength || length > kms.MaxLength:
		return d.refuse(p, node.GetDataKey, id, failure.Newf(failure.Usage, "", "a key of %d bytes: allowed are %d to %d", length, kms.MinLength, kms.MaxLength))
	case d.cfg.Allows(p, node.GetDataKey, id) && (configured || d.volumes.knows(id)):
		return d.refuse(p, node.GetDataKey, id, failure.Newf(failure.PolicyDenied, "open it with Open", "the agent opens this volume itself, and its key stays here"))
	}
	return d.allow(ctx, node.GetDataKey, id)
}

// maxConstellation bounds a request of Constellation's API in bytes.
const maxConstellation = 4 << 10

// newConstellationServer serves Constellation's API on a listener of its own.
func newConstellationServer(v *Volumes, cfg *node.Config, log *slog.Logger) *grpc.Server {
	who := callers{cfg, log}
	s := newLocalServer(who, maxConstellation)
	constellation.RegisterAPIServer(s, &constellationAPI{keys: newDataKeys(who, v)})
	return s
}

// constellationAPI is the same for programs that were written for Constellation.
type constellationAPI struct {
	constellation.UnimplementedAPIServer
	keys *dataKeys
}

// GetDataKey implements Constellation's API.
func (a *constellationAPI) GetDataKey(ctx context.Context, r *constellation.GetDataKeyRequest) (*constellation.GetDataKeyResponse, error) {
	key, err := a.keys.get(ctx, r.GetDataKeyId(), r.GetLength())
	return &constellation.GetDataKeyResponse{DataKey: key}, err
}
