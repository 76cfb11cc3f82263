package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/setup"
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
			if err := cfg.CheckServing(); err != nil {
				return err
			}
			if check {
				if err := checkAgent(cfg, log); err != nil {
					return err
				}
				cmd.Println("the configuration is good")
				return nil
			}
			notify := systemd.NewNotifier()
			m, closer, err := newManager(cfg, log, notify.Waiting)
			if err != nil {
				return err
			}
			defer closer.Close()
			log.Info("starting", "volumes", len(cfg.Volumes), "secrets", secret.InForce(), "erasing", secret.Erases)
			return agent.New(cfg, m, log, notify).Run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultAgentConfig, "configuration file")
	cmd.Flags().BoolVar(&check, "check", false, "only check the configuration")
	logs.add(cmd)
	return cmd
}

// checkAgent builds what can be built without the hardware that the
// configuration speaks of.
func checkAgent(cfg *agent.Config, log *slog.Logger) error {
	if _, err := tpm.NewIssuer(tpmOptions(cfg)); err != nil {
		return failure.New(failure.Configuration, err, "")
	}
	_, err := serverDemands(cfg.ServerPolicy, nil, log)
	return err
}

func tpmOptions(cfg *agent.Config) tpm.IssuerOptions {
	return tpm.IssuerOptions{Device: cfg.TPM.Device, AK: tpm.AKType(cfg.TPM.AK), EK: tpm.EKType(cfg.TPM.EK),
		EKPin: cfg.TPM.EKPin, EventLog: cfg.TPM.EventLog}
}

// newManager wires the node's parts. The closer ends its connections.
func newManager(cfg *agent.Config, log *slog.Logger, progress agent.Progress) (*agent.Manager, io.Closer, error) {
	client, closer, err := newKeyClient(cfg, log, progress)
	if err != nil {
		return nil, nil, err
	}
	return agent.NewManager(cfg, client, log, progress), closer, nil
}

// newKeyClient is what of the node's parts gets keys.
func newKeyClient(cfg *agent.Config, log *slog.Logger, progress agent.Progress) (*agent.Client, io.Closer, error) {
	source, err := cfg.Endorsements.Open("amd", "intel")
	if err != nil {
		return nil, nil, failure.New(failure.Configuration, fmt.Errorf("endorsements: %w", err), "")
	}
	issuers, err := nodeIssuers(cfg, source, log)
	if err != nil {
		return nil, nil, errors.Join(err, source.Close())
	}
	server, err := serverDemands(cfg.ServerPolicy, source, log)
	if err != nil {
		return nil, nil, errors.Join(err, source.Close())
	}
	client, err := agent.NewClient(agent.ClientOptions{
		Config: cfg, Issuers: issuers, Server: server, Log: log, Progress: progress,
	})
	if err != nil {
		return nil, nil, failure.New(failure.Configuration, errors.Join(err, source.Close()), "")
	}
	return client, closers{client, source}, nil
}

// closers are closed in order.
type closers []io.Closer

func (c closers) Close() error {
	var err error
	for _, one := range c {
		err = errors.Join(err, one.Close())
	}
	return err
}

// nodeIssuers chooses this machine's evidence for each connection, and says which
// and why whenever that is news.
func nodeIssuers(cfg *agent.Config, source endorsement.Source, log *slog.Logger) (func(context.Context) ([]attestation.Issuer, error), error) {
	kinds, err := setup.ParseKinds(cfg.Evidence)
	if err != nil {
		return nil, failure.New(failure.Configuration, err, "")
	}
	if _, err := tpm.NewIssuer(tpmOptions(cfg)); err != nil {
		return nil, failure.New(failure.Configuration, err, "")
	}
	opts := setup.IssuerOptions{
		Kinds:        kinds,
		TPM:          tpmOptions(cfg),
		Metadata:     cfg.Azure.Metadata,
		Attestation:  cfg.Azure.Attestation,
		Endorsements: source,
		Log:          func(msg string, err error) { log.Warn(msg, "error", err) },
	}
	news := newsOf(log)
	return func(ctx context.Context) ([]attestation.Issuer, error) {
		issuers, findings, err := setup.Issuers(ctx, opts)
		news(findings)
		switch {
		case errors.Is(err, attestation.ErrNoDevice):
			return nil, failure.New(failure.NoDevice, err, "keyagent evidence shows what this machine has and what it lacks")
		case err != nil:
			return nil, failure.New(failure.Configuration, err, "")
		}
		return issuers, nil
	}, nil
}

// newsOf logs findings that are not those of the time before.
func newsOf(log *slog.Logger) func([]setup.Finding) {
	var mu sync.Mutex
	var before []setup.Finding
	return func(now []setup.Finding) {
		mu.Lock()
		defer mu.Unlock()
		if slices.Equal(before, now) {
			return
		}
		before = now
		for _, f := range now {
			log.Info("evidence", "kind", f.Kind, "found", f.Found, "used", f.Used, "why", f.Why)
		}
	}
}

// serverDemands is what the key service must prove, if anything.
func serverDemands(policyPath string, source endorsement.Source, log *slog.Logger) (*atls.Peers, error) {
	if policyPath == "" {
		return nil, nil
	}
	p, err := keyservice.NewPolicySource(policyPath, log)
	if err != nil {
		return nil, failure.New(failure.Configuration, err, "keyagent policy check says what is wrong")
	}
	return p.Peers(source)
}
