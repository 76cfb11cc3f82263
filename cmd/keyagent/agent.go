package main

import (
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/agent"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyservice"
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
reached is tried again within the configured budget; a refusal is final.`,
		Example: `  keyagent agent --config /etc/keyagent/agent.yaml
  keyagent agent --check`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			cfg, err := agent.LoadConfig(path)
			if err != nil {
				return err
			}
			notify := systemd.NewNotifier()
			m, closer, err := newManager(cfg, log, notify.Waiting)
			if err != nil {
				return err
			}
			defer closer.Close()
			if err := cfg.CheckServing(); err != nil {
				return err
			}
			if check {
				cmd.Println("the configuration is good")
				return nil
			}
			log.Info("starting", "volumes", len(cfg.Volumes), "secrets", secret.InForce(), "erasing", secret.Erases)
			return agent.New(cfg, m, log, notify).Run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultAgentConfig, "configuration file")
	cmd.Flags().BoolVar(&check, "check", false, "only check the configuration")
	logs.add(cmd)
	return cmd
}

// newManager wires the node's parts. The closer ends its connections.
func newManager(cfg *agent.Config, log *slog.Logger, progress agent.Progress) (*agent.Manager, io.Closer, error) {
	issuer, err := tpm.NewIssuer(tpm.IssuerOptions{
		Device: cfg.TPM.Device, EK: tpm.EKType(cfg.TPM.EK), EKPin: cfg.TPM.EKPin, EventLog: cfg.TPM.EventLog,
	})
	if err != nil {
		return nil, nil, failure.New(failure.Configuration, err, "")
	}
	server, err := serverDemands(cfg.ServerPolicy, log)
	if err != nil {
		return nil, nil, err
	}
	client, err := agent.NewClient(agent.ClientOptions{
		Config: cfg, Issuers: []attestation.Issuer{issuer}, Server: server, Log: log, Progress: progress,
	})
	if err != nil {
		return nil, nil, failure.New(failure.Configuration, err, "")
	}
	return agent.NewManager(cfg, client, log, progress), client, nil
}

// serverDemands is what the key service must prove, if anything.
func serverDemands(policyPath string, log *slog.Logger) (*atls.Peers, error) {
	if policyPath == "" {
		return nil, nil
	}
	source, err := keyservice.NewPolicySource(policyPath, log)
	if err != nil {
		return nil, failure.New(failure.Configuration, err, "keyagent policy check says what is wrong")
	}
	v, err := tpm.NewVerifier(tpm.VerifierOptions{Trust: source.TPMTrust})
	if err != nil {
		return nil, err
	}
	return &atls.Peers{Verifiers: []attestation.Verifier{v}, Appraiser: source}, nil
}
