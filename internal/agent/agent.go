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
	"context"
	"errors"
	"fmt"
	"log/slog"
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
// closed on request, or by the machine's power off.
func (a *Agent) Run(ctx context.Context) error {
	if err := a.cfg.CheckServing(); err != nil {
		return err
	}
	listener, err := listenUnix(a.cfg.Socket)
	if err != nil {
		return failure.New(failure.Configuration, err, "")
	}
	keySockets, err := a.keySockets()
	if err != nil {
		return err
	}
	a.volumes.Recover(ctx)
	server := newNodeServer(ctx, a.volumes, a.cfg, a.log)
	stop := ctx
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := server.Serve(listener); !errors.Is(err, grpc.ErrServerStopped) {
			return err
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		a.notify.Stopping()
		force := time.AfterFunc(stopTimeout, server.Stop)
		defer force.Stop()
		server.GracefulStop()
		return nil
	})
	group.Go(func() error { a.volumes.KeepLeases(ctx); return nil })
	group.Go(func() error { a.volumes.WatchHeaders(ctx, a.cfg.WatchEvery()); return nil })
	group.Go(func() error { return a.serveKeys(ctx, keySockets) })
	if a.cfg.Metrics != "" {
		group.Go(func() error { return a.volumes.ServeMetrics(ctx, a.cfg.Metrics) })
	}
	group.Go(func() error { return a.boot(ctx, stop) })
	return group.Wait()
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
	_, err := a.volumes.OpenAll(ctx, a.cfg.Volumes)
	if err != nil {
		if stop.Err() != nil {
			return nil // asked to stop while it waited
		}
		a.notify.Failed(inOneLine(err))
		return err
	}
	a.log.Info("ready", "volumes", len(a.cfg.Volumes), "uptime_s", uptime())
	a.notify.Ready(fmt.Sprintf("%d volumes are open", len(a.cfg.Volumes)))
	go a.volumes.OpenLate(ctx, a.cfg.Volumes)
	return a.notify.Watch(ctx)
}
