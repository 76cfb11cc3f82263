// Package agent is the node: it opens the volumes of this machine and serves the
// local API to those who may use it.
//
// A volume is opened in the order key, map, mount; a new one in the order key,
// format, map, filesystem, confirm, mount. The key service's record is the only
// authority on which of the two it is, and the DEK is wiped as soon as the
// kernel has the volume key.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/systemd"
)

// stopTimeout bounds how long local calls under way may still take.
const stopTimeout = 10 * time.Second

// Agent is the node daemon.
type Agent struct {
	cfg     *Config
	manager *Manager
	log     *slog.Logger
	notify  *systemd.Notifier
}

// New returns an agent. notify may be nil.
func New(cfg *Config, m *Manager, log *slog.Logger, notify *systemd.Notifier) *Agent {
	return &Agent{cfg: cfg, manager: m, log: log, notify: notify}
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
	server := newNodeServer(a.manager, a.cfg.Callers, a.log)
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
	group.Go(func() error {
		if err := a.manager.OpenAll(ctx); err != nil {
			if stop.Err() != nil {
				return nil // asked to stop while it waited
			}
			return err
		}
		a.log.Info("ready", "volumes", len(a.cfg.Volumes), "uptime_s", uptime())
		a.notify.Ready(fmt.Sprintf("%d volumes are open", len(a.cfg.Volumes)))
		return a.notify.Watch(ctx)
	})
	return group.Wait()
}
