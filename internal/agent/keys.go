package agent

import (
	"context"
	"net"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keysocket"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

// keySockets are the sockets at which systemd asks for keys: those that it hands over,
// and the rest of what the configuration names.
func (a *Agent) keySockets() ([]*net.UnixListener, error) {
	out, err := unixsocket.InheritedAll()
	if err != nil {
		return nil, err
	}
	paths := a.cfg.KeySocket.Paths(a.cfg.Volumes)
	for _, l := range out {
		i := slices.Index(paths, l.Addr().String())
		if i < 0 {
			return nil, failure.Newf(failure.Configuration, "path or drop_ins of key_socket, or disable keyagent-keys.socket",
				"systemd hands over the socket %s, and key_socket has none there", l.Addr())
		}
		paths = slices.Delete(paths, i, i+1)
	}
	for _, path := range paths {
		l, err := unixsocket.Listen(path, unixsocket.Options{UID: -1, GID: -1})
		if err != nil {
			return nil, failure.New(failure.Configuration, err, "")
		}
		out = append(out, l)
	}
	return out, nil
}

// serveKeys gives systemd the keys of volumes that it maps, and looks after these, until
// ctx ends.
func (a *Agent) serveKeys(ctx context.Context, listeners []*net.UnixListener) error {
	ids := a.cfg.HandedOut()
	if len(ids) == 0 {
		return nil
	}
	server := &keysocket.Server{Rules: keyRules(a.cfg), Volumes: handOuts{a}, Log: a.log}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return server.Serve(ctx, listeners) })
	group.Go(func() error { a.volumes.WatchMapped(ctx, ids); return nil })
	for _, id := range ids {
		v, _ := a.cfg.Volume(id)
		a.volumes.Know(v)
		// What is wrong with it is in the log, and in its state.
		group.Go(func() error { _ = a.volumes.TakeOver(ctx, v); return nil })
	}
	return group.Wait()
}

func keyRules(cfg *node.Config) []keysocket.Rule {
	var out []keysocket.Rule
	for _, c := range cfg.KeySocket.Consumers {
		r := keysocket.Rule{Volume: c.Volume, Unit: c.Unit, Credential: c.Credential}
		if v, ok := cfg.Volume(c.Volume); ok && c.Credential == "" {
			r.Mapping = v.Name
		}
		out = append(out, r)
	}
	return out
}

// handOuts are the volumes as a key socket asks for them.
type handOuts struct{ *Agent }

// HandOut implements keysocket.Volumes.
func (h handOuts) HandOut(ctx context.Context, id string, give func([]byte) error, gone <-chan struct{}) error {
	v, ok := h.cfg.Volume(id)
	if !ok {
		return node.UnknownVolume(id)
	}
	_, err := h.volumes.HandOut(ctx, v, Recipient{Give: give, Gone: gone})
	return err
}
