package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/policysource"
)

// Check builds what can be built without the hardware that the configuration
// speaks of.
func (c *Config) Check(log *slog.Logger) error {
	if _, err := c.TPM.Options(); err != nil {
		return failure.New(failure.Configuration, fmt.Errorf("tpm: %w", err), "")
	}
	_, err := c.serverDemands(nil, log)
	return err
}

// KeyClient wires the node's client of the key service. The closer ends its
// connections.
func (c *Config) KeyClient(log *slog.Logger, progress keyclient.Progress) (*keyclient.Client, io.Closer, error) {
	source, err := c.Endorsements.Open("amd", "intel")
	if err != nil {
		return nil, nil, failure.New(failure.Configuration, fmt.Errorf("endorsements: %w", err), "")
	}
	client, err := c.keyClient(source, log, progress)
	if err != nil {
		return nil, nil, errors.Join(err, source.Close())
	}
	return client, closers{client, source}, nil
}

func (c *Config) keyClient(source endorsement.Source, log *slog.Logger, progress keyclient.Progress) (*keyclient.Client, error) {
	issuers, err := c.issuers(source, log)
	if err != nil {
		return nil, err
	}
	server, err := c.serverDemands(source, log)
	if err != nil {
		return nil, err
	}
	host, _ := os.Hostname() // for people's eyes; empty is fine
	client, err := keyclient.New(keyclient.Options{
		Servers: c.endpoints(), Retry: c.Retry.retry, Issuers: issuers, Server: server, Log: log, Progress: progress, Node: host,
		FloorFile: filepath.Join(c.StateDir, "time-floor"), Witness: c.witness(log),
	})
	return client, failure.New(failure.Configuration, err, "")
}

func (c *Config) endpoints() []keyclient.Server {
	out := make([]keyclient.Server, len(c.Servers))
	for i, s := range c.Servers {
		out[i] = s.Server()
	}
	return out
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

// issuers chooses this machine's evidence for each connection, and says which and
// why whenever that is news.
func (c *Config) issuers(source endorsement.Source, log *slog.Logger) (func(context.Context) ([]attestation.Issuer, error), error) {
	chosen, err := kinds.All().Parse(c.Evidence)
	if err != nil {
		return nil, failure.New(failure.Configuration, err, "")
	}
	options, err := c.TPM.Options()
	if err != nil {
		return nil, failure.New(failure.Configuration, fmt.Errorf("tpm: %w", err), "")
	}
	opts := kinds.IssuerOptions{
		Kinds:        chosen,
		TPM:          options,
		Metadata:     c.Azure.Metadata,
		Attestation:  c.Azure.Attestation,
		Endorsements: source,
		Log:          func(msg string, err error) { log.Warn(msg, "error", err) },
	}
	news := newsOf(log)
	return func(ctx context.Context) ([]attestation.Issuer, error) {
		issuers, findings, err := kinds.All().Issuers(ctx, opts)
		news(findings)
		if err != nil && !errors.Is(err, attestation.ErrNoDevice) {
			return nil, failure.New(failure.Configuration, err, "")
		}
		return issuers, err
	}, nil
}

// newsOf logs findings that are not those of the time before.
func newsOf(log *slog.Logger) func([]kinds.Finding) {
	var mu sync.Mutex
	var before []kinds.Finding
	return func(now []kinds.Finding) {
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
func (c *Config) serverDemands(source endorsement.Source, log *slog.Logger) (*atls.Peers, error) {
	if c.ServerPolicy == "" {
		return nil, nil
	}
	p, err := policysource.New(c.ServerPolicy, log)
	if err != nil {
		return nil, failure.New(failure.Configuration, err, "keyagent policy check says what is wrong")
	}
	return p.Peers(source, nil)
}
