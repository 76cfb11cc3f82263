//go:build !keyagent_node

package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/keyagent/keyagent/internal/failure"
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
	var check, initMaster, initAudit, initRecords bool
	var override keyservice.Config
	var logs logFlags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the key service",
		Long: `Run the key service: verify evidence, apply the policy, release volume keys.

SIGHUP reads the policy and the TLS certificate again; what does not load leaves
what is in force as it is. SIGTERM lets requests under way finish.`,
		Example: `  keyagent serve --config /etc/keyagent/serve.yaml
  keyagent serve --config serve.yaml --init-master-secret   # the first time
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
			cfg, err := keyservice.LoadConfig(path, override)
			if err != nil {
				return err
			}
			cfg.InitAudit, cfg.InitRecords = initAudit, initRecords
			if initMaster {
				if err := initMasterSecret(cmd.Context(), cfg); err != nil {
					return err
				}
			}
			filtered, err := cfg.ConfineCalls()
			if err != nil {
				return err
			}
			server, err := keyservice.NewServer(cmd.Context(), cfg, log)
			if err != nil {
				return err
			}
			if check {
				cmd.Println("the configuration is valid")
				return server.Close()
			}
			landlock, err := server.ConfineFiles(path)
			if err != nil {
				return errors.Join(err, server.Close())
			}
			reloadOnHangup(cmd.Context(), func() {
				if err := server.Reload(); err != nil {
					log.Error("reload failed, what is in force stays", "error", err)
				}
			})
			log.Info("serving", "address", server.Addr().String(), "secrets", secret.InForce(), "erasing", secret.Erases, "seccomp", filtered, "landlock", landlock)
			notify := systemd.NewNotifier()
			notify.Ready("serving on " + server.Addr().String())
			go func() { <-cmd.Context().Done(); notify.Stopping() }()
			return server.Run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringVar(&path, "config", serveConfig, "configuration file")
	f.BoolVar(&check, "check", false, "only check that everything can be opened; what a first start makes is made")
	f.BoolVar(&initMaster, "init-master-secret", false, "make the master secret's file if it does not exist")
	f.BoolVar(&initAudit, "init-audit", false, "begin an audit log beside records that are there: for one start, when it was lost or on a new replica")
	f.BoolVar(&initRecords, "init-records", false, "begin records anew although the audit log knows volumes: for one start, when they are lost for good")
	overrideFlags(f, &override)
	logs.add(cmd)
	return cmd
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
	hint := ""
	if errors.Is(err, kms.ErrURI) {
		hint = "--init-master-secret goes with kms://cluster-kms?file=PATH, and with wrappedFile"
	}
	return failure.New(failure.Configuration, err, hint)
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
