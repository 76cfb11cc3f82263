// Package agent is the node: it opens, keeps and closes the volumes of this
// machine, whatever names them, and serves the local API to those who may use it.
//
// [Volumes] is the core. The configuration file, callers of the local API and the
// command line are its front ends: each makes a node.Volume and says what it wants.
// A volume's life is the table in life.go. The key service's record is the only
// authority on whether a volume may be created, and the DEK is wiped as soon as the
// kernel has the volume key.
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/systemd"
)

// stopTimeout bounds how long local calls under way may still take.
const stopTimeout = 10 * time.Second

// Agent is the node daemon.
type Agent struct {
	cfg     *node.Config
	volumes *Volumes
	log     *slog.Logger
	notify  *systemd.Notifier
}

// New returns an agent. notify may be nil.
func New(cfg *node.Config, v *Volumes, log *slog.Logger, notify *systemd.Notifier) *Agent {
	return &Agent{cfg: cfg, volumes: v, log: log, notify: notify}
}

// Run opens the configured volumes, tells systemd that the node is ready, and
// serves the local API until ctx ends. Volumes stay open afterwards: they are
// closed on request, or by the machine's power off. A volume that is refused for good
// ends it, unless others are open: nobody else renews their leases.
func (a *Agent) Run(ctx context.Context) error {
	if err := a.cfg.CheckServing(); err != nil {
		return err
	}
	servers, err := a.servers(ctx)
	if err != nil {
		return failure.New(failure.Configuration, err, "")
	}
	keySockets, err := a.keySockets()
	if err != nil {
		return err
	}
	a.volumes.Recover(ctx)
	stop := ctx
	group, ctx := errgroup.WithContext(ctx)
	for _, s := range servers {
		group.Go(func() error { return s.serve(ctx) })
	}
	group.Go(func() error { <-ctx.Done(); a.notify.Stopping(); return nil })
	group.Go(func() error { a.volumes.KeepLeases(ctx); return nil })
	group.Go(func() error { a.volumes.WatchHeaders(ctx, a.cfg.WatchEvery()); return nil })
	group.Go(func() error { return a.serveKeys(ctx, keySockets) })
	if a.cfg.Metrics != "" {
		group.Go(func() error { return a.volumes.ServeMetrics(ctx, a.cfg.Metrics) })
	}
	// Found before anything is opened: what is proved is no longer the initrd's.
	handed := a.volumes.handedOver(a.cfg.Volumes)
	group.Go(func() error { a.volumes.ProveHandedOver(ctx, handed); return nil })
	group.Go(func() error { return a.boot(ctx, stop) })
	return group.Wait()
}

// local is a service for this machine's callers.
type local struct {
	*grpc.Server
	listener net.Listener
}

// servers are the local API's, and Constellation's if the configuration names a socket
// for it.
func (a *Agent) servers(life context.Context) ([]local, error) {
	listener, err := listenUnix(a.cfg.Socket)
	if err != nil {
		return nil, err
	}
	all := []local{{newNodeServer(life, a.volumes, a.cfg, a.log), listener}}
	if path := a.cfg.Constellation.Socket; path != "" {
		if listener, err = listenUnix(path); err != nil {
			return nil, errors.Join(err, all[0].listener.Close())
		}
		all = append(all, local{newConstellationServer(a.volumes, a.cfg, a.log), listener})
	}
	return all, nil
}

// serve returns when ctx has ended, and what was under way then.
func (s local) serve(ctx context.Context) error {
	ended := make(chan struct{})
	defer func() { <-ended }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer close(ended)
		<-ctx.Done()
		force := time.AfterFunc(stopTimeout, s.Stop)
		defer force.Stop()
		s.GracefulStop()
	}()
	if err := s.Serve(s.listener); !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// inOneLine is an error as systemctl status shows it: its class, where the other side
// has more to say about it, and what to do.
func inOneLine(err error) string {
	f := failure.Of(err)
	text := fmt.Sprintf("failed, %s: %v", f.Class, err)
	if f.CorrelationID != "" && !strings.Contains(text, f.CorrelationID) {
		text += " (correlation id " + f.CorrelationID + ")"
	}
	return text
}

// boot opens what the configuration names, and then what comes late.
func (a *Agent) boot(ctx, stop context.Context) error {
	wait, err := a.volumes.OpenAll(ctx, a.cfg.Volumes)
	if err != nil {
		wait() // an optional volume may come up and need this agent
	}
	switch {
	case err != nil && stop.Err() != nil:
		return nil // asked to stop while it waited
	case err != nil && !a.volumes.leased():
		a.notify.Status(inOneLine(err))
		return err
	case err != nil:
		a.log.Error("a volume is not open, and the agent stays for the leases of those that are", "error", err, "class", failure.Of(err).Class)
	default:
		a.log.Info("ready", "volumes", len(a.cfg.Volumes), "uptime_s", uptime())
	}
	a.notify.Ready(a.status())
	go a.volumes.OpenLate(ctx, a.cfg.Volumes)
	go a.keepStatus(ctx)
	return a.notify.Watch(ctx)
}

// passes says that what led to this error may be over at another attempt: the unit starts
// an agent again that ends with it, and one that stays tries again itself.
func passes(err error) bool {
	switch failure.Of(err).Class {
	case failure.Internal, failure.Unreachable, failure.DeviceBusy, failure.Held:
		return true
	}
	return false
}

// status is the first volume that should be open and is not, or that all are.
func (a *Agent) status() string {
	var blocked error
	for _, v := range a.cfg.Volumes {
		switch err := a.volumes.LastError(v.ID); {
		case err == nil || v.Optional || v.OnRequest:
		case errors.Is(err, ErrBlocked):
			blocked = cmp.Or(blocked, in(v.ID, err))
		default:
			return inOneLine(in(v.ID, err))
		}
	}
	if blocked != nil {
		return inOneLine(blocked)
	}
	return fmt.Sprintf("%d volumes are open", len(a.cfg.Volumes))
}

// statusEvery is how soon the unit's status shows that a volume came up after all, and
// how long what was waited for meanwhile stands there.
const statusEvery = 5 * time.Second

func (a *Agent) keepStatus(ctx context.Context) {
	tick := time.NewTicker(statusEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		a.notify.Status(a.status())
	}
}
