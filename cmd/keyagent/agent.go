package main

import (
	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/agent"
	"github.com/keyagent/keyagent/internal/confine"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/systemd"
)

const defaultAgentConfig = "/etc/keyagent/agent.yaml"

func newAgent() *cobra.Command {
	var path string
	var check bool
	var logs logFlags
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Open this machine's volumes, then serve local callers",
		Long: `Open this machine's volumes, then serve local callers on a unix socket.

The agent tells systemd that it is ready when every volume that is not optional
is open, and mounted where the configuration says. A key service that cannot be
reached is tried again within the configured budget; a refusal is final. What does
not open ends the agent, unless other volumes are open, whose leases it renews; it
then tries again what may pass. A disk that appears later is opened then.`,
		Example: `  keyagent agent --config /etc/keyagent/agent.yaml
  keyagent agent --check`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			cfg, err := node.Load(path)
			if err != nil {
				return err
			}
			if !check { // which another machine may do
				if err := cfg.Resolve(cmd.Context()); err != nil {
					return err
				}
			}
			if err := cfg.CheckServing(); err != nil {
				return err
			}
			for _, a := range cfg.Advice() {
				log.Warn(a)
			}
			if check {
				if err := cfg.Check(log); err != nil {
					return err
				}
				cmd.Println("the configuration is valid")
				return nil
			}
			// No landlock: it forbids to mount.
			filtered, err := confine.Syscalls(confine.Volumes)
			if err != nil {
				return failure.New(failure.Internal, err, "")
			}
			notify := systemd.NewNotifier()
			keys, closer, err := cfg.KeyClient(log, notify.Waiting)
			if err != nil {
				return err
			}
			defer closer.Close()
			log.Info("starting", "volumes", len(cfg.Volumes), "secrets", secret.InForce(), "erasing", secret.Erases, "seccomp", filtered)
			return agent.New(cfg, newCore(cfg, keys, log, notify.Waiting), log, notify).Run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultAgentConfig, "configuration file")
	cmd.Flags().BoolVar(&check, "check", false, "only check the configuration")
	logs.add(cmd)
	return cmd
}
