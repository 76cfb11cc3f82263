//go:build !keyagent_node

package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/keyservice"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/setup"
	"github.com/keyagent/keyagent/systemd"
)

// serveConfig is where the key service's configuration is, unless it is named.
const serveConfig = "/etc/keyagent/serve.yaml"

func newServe() *cobra.Command {
	var path string
	var check, initMaster, initAudit, initRecords, sealed bool
	var override keyservice.Config
	var join []string
	var logs logFlags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the key service",
		Long: `Run the key service: verify evidence, apply the policy, release volume keys.

SIGHUP reads the policy and the TLS certificate again; what does not load leaves
what is in force as it is. SIGTERM lets requests under way finish.

With --join the service asks others over the same storage for the master secret of
kms://cluster-kms, if it does not have it itself: joined=true leaves it to them, sealedFile
and wrappedFile are for when none of them runs. Each proves to the other, by its evidence,
that its profile is in replicas, in the policy. A peer of --join has this service's own TLS
certificate; join in the configuration file names another authority.`,
		Example: `  keyagent serve --config /etc/keyagent/serve.yaml
  keyagent serve --config serve.yaml --init-master-secret   # the first time
  keyagent serve --config serve.yaml --join keys-1:8443     # beside another one
  keyagent serve --config serve.yaml --check`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if err := refuseSecrets(override.KMS, override.Storage); err != nil {
				return err
			}
			for _, address := range join {
				override.Join = append(override.Join, keyclient.ServerConfig{Address: address})
			}
			cfg, err := keyservice.LoadConfig(path, override)
			if err != nil {
				return err
			}
			cfg.InitAudit, cfg.InitRecords = initAudit, initRecords
			if sealed && setup.SealedFile(cfg.KMS) == "" {
				return failure.Newf(failure.Configuration, "keyagent kms split makes the file", "--sealed, and kms: names no sealedFile")
			}
			if initMaster {
				if err := initMasterSecret(cmd.Context(), cfg); err != nil {
					return err
				}
			}
			filtered, err := cfg.ConfineCalls()
			if err != nil {
				return err
			}
			notify := systemd.NewNotifier()
			reload := &reloader{log: log}
			reloadOnHangup(cmd.Context(), reload.reload)
			server, err := unsealedServer(cmd.Context(), cfg, log, notify, reload, check)
			if err != nil {
				return err
			}
			if check {
				if server == nil {
					cmd.Println("the configuration is valid as far as a sealed key service can look")
					return nil
				}
				cmd.Println("the configuration is valid")
				return server.Close()
			}
			landlock, err := server.ConfineFiles(path)
			if err != nil {
				return errors.Join(err, server.Close())
			}
			reload.set(server.Reload)
			log.Info("serving", "address", server.Addr().String(), "secrets", secret.InForce(), "erasing", secret.Erases, "seccomp", filtered, "landlock", landlock)
			notify.Ready("serving on " + server.Addr().String())
			go func() { <-cmd.Context().Done(); notify.Stopping() }()
			return server.Run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringVar(&path, "config", serveConfig, "configuration file")
	f.BoolVar(&check, "check", false, "only check that everything can be opened; what a first start makes is made")
	f.BoolVar(&initMaster, "init-master-secret", false, "make the master secret's file if it does not exist")
	f.BoolVar(&sealed, "sealed", false, "insist that operators unseal it: fail if kms: has the master secret in another way")
	f.BoolVar(&initAudit, "init-audit", false, "begin an audit log beside records that are there: for one start, when it was lost or on a new replica")
	f.BoolVar(&initRecords, "init-records", false, "begin records anew although the audit log knows volumes: for one start, when they are lost for good")
	f.StringArrayVar(&join, "join", nil, "HOST:PORT of another key service over the same storage, besides those of the file; may be repeated")
	overrideFlags(f, &override)
	logs.add(cmd)
	return cmd
}

// unsealedServer opens the key service, which waits for its operators' shares, or for another key
// service, if its master secret is with them. With check it does not wait: nil.
func unsealedServer(ctx context.Context, cfg *keyservice.Config, log *slog.Logger, notify *systemd.Notifier, reload *reloader, check bool) (*keyservice.Server, error) {
	sealed, err := keyservice.OpenSealed(cfg, log)
	switch {
	case err != nil:
		return nil, err
	case sealed == nil, check && !sealed.Waits():
		return keyservice.NewServer(ctx, cfg, log)
	case check:
		return nil, errors.Join(sealed.Check(ctx, true), sealed.Close())
	}
	reload.set(sealed.Reload)
	// systemd would not wait for as long as people take.
	return sealed.Unseal(ctx, func() { notify.Ready(sealed.String()) })
}

// reloader does at SIGHUP what the part of the service that runs wants. It is one for the whole
// run: a signal that comes while one part hands over to the next is kept.
type reloader struct {
	log *slog.Logger

	mu   sync.Mutex
	f    func() error
	kept bool
}

func (r *reloader) set(f func() error) {
	r.mu.Lock()
	r.f = f
	kept := r.kept
	r.kept = false
	r.mu.Unlock()
	if kept {
		r.reload()
	}
}

func (r *reloader) reload() {
	r.mu.Lock()
	f := r.f
	r.kept = true // for the part that comes next
	r.mu.Unlock()
	if f == nil {
		return
	}
	if err := f(); err != nil {
		r.log.Error("reload failed, what is in force stays", "error", err)
	}
}

// overrideFlags stand for fields of the configuration file.
func overrideFlags(f *pflag.FlagSet, override *keyservice.Config) {
	f.StringVar(&override.Listen, "listen", "", "address, instead of the file's")
	f.StringVar(&override.Policy, "policy", "", "policy file, instead of the file's")
	f.StringVar(&override.KMS, "kms", "", "kms:// URI, instead of the file's")
	f.StringVar(&override.Storage, "storage", "", "storage:// URI, instead of the file's")
	f.StringVar(&override.Audit, "audit", "", "audit log, instead of the file's")
	f.StringVar(&override.Metrics, "metrics", "", "address of /metrics, /healthz and /readyz, instead of the file's")
}

// initMasterSecret leaves a file that exists alone.
func initMasterSecret(ctx context.Context, cfg *keyservice.Config) error {
	err := setup.InitMaster(ctx, cfg.KMS)
	if errors.Is(err, kms.ErrURI) {
		return failure.New(failure.Configuration, err, "--init-master-secret goes with kms://cluster-kms?file=PATH, and with wrappedFile")
	}
	return keyservice.BackendError(err)
}

// reloadOnHangup calls f for each SIGHUP from now on, until ctx ends.
func reloadOnHangup(ctx context.Context, f func()) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	go func() {
		defer signal.Stop(hangup)
		for {
			select {
			case <-ctx.Done():
				return
			case <-hangup:
				f()
			}
		}
	}()
}
