package keyservice

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/localweb"
	"github.com/keyagent/keyagent/internal/policysource"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/shares"
	"github.com/keyagent/keyagent/internal/unseal"
	"github.com/keyagent/keyagent/kms/setup"
)

// Sealed is a key service whose master secret its operators have in shares. It takes those, and
// does nothing else.
type Sealed struct {
	cfg    *Config
	log    *slog.Logger
	sealed *shares.Sealed
	gather *unseal.Gatherer
	cert   atomic.Pointer[tls.Certificate]
}

// OpenSealed returns the key service of a configuration that names a sealed master secret, or nil
// if it names none.
func OpenSealed(cfg *Config, log *slog.Logger) (*Sealed, error) {
	path := setup.SealedFile(cfg.KMS)
	if path == "" {
		return nil, nil
	}
	data, err := config.ReadPublicFile(path, shares.MaxSealed)
	if err != nil {
		return nil, failure.New(failure.Configuration, fmt.Errorf("kms: %w", err), "keyagent kms split makes it")
	}
	file, err := shares.ParseSealed(data)
	if err != nil {
		return nil, failure.New(failure.Configuration, fmt.Errorf("kms: %s: %w", path, err), "it is the file master.sealed of keyagent kms split")
	}
	s := &Sealed{cfg: cfg, log: log, sealed: file, gather: unseal.NewGatherer(file, time.Now)}
	return s, s.Reload()
}

// Reload reads the certificate again. What does not load leaves the one in force.
func (s *Sealed) Reload() error {
	cert, err := loadCertificate(s.cfg)
	if err == nil {
		s.cert.Store(cert)
	}
	return err
}

// String says what is waited for.
func (s *Sealed) String() string {
	p := s.gather.Progress()
	return fmt.Sprintf("sealed: %d of %d shares", p.Have, p.Threshold)
}

// Check looks at what can be looked at without the master secret, so that operators are not asked
// for their shares in vain. With all it opens the storage and the other KMSs as well.
func (s *Sealed) Check(ctx context.Context, all bool) error {
	if _, err := policysource.New(s.cfg.Policy, slog.New(slog.DiscardHandler)); err != nil {
		return failure.New(failure.Configuration, err, "keyagent policy check says what is wrong")
	}
	for i, uri := range s.cfg.OldKMS {
		if setup.SealedFile(uri) != "" {
			return failure.Newf(failure.Configuration, "put its master secret together with keyagent kms combine", "old_kms[%d] names a sealed master secret, and shares are taken of kms alone", i)
		}
	}
	stand, err := secret.Random(32)
	if err != nil {
		return err
	}
	defer stand.Close()
	k, err := setup.Unsealed(ctx, s.cfg.KMS, stand) // each gives a KMS
	if err != nil {
		return BackendError(fmt.Errorf("kms: %w", err))
	}
	if err := k.Close(); err != nil || !all {
		return err
	}
	for i, uri := range s.cfg.OldKMS {
		k, err := setup.KMS(ctx, uri)
		if err != nil {
			return BackendError(fmt.Errorf("old_kms[%d]: %w", i, err))
		}
		if err := k.Close(); err != nil {
			return err
		}
	}
	st, err := setup.Storage(ctx, s.cfg.Storage)
	if err != nil {
		return BackendError(fmt.Errorf("storage: %w", err))
	}
	return st.Close()
}

// againAfter is the pause between two attempts to start with a master secret that is there.
const againAfter = 5 * time.Second

// Unseal serves until operators have given enough shares, and returns the key service then, as
// NewServer does. listening is called once, when it takes shares.
func (s *Sealed) Unseal(ctx context.Context, listening func()) (*Server, error) {
	defer s.gather.Close()
	if err := s.Check(ctx, false); err != nil {
		return nil, err
	}
	timeout, err := s.cfg.timeout()
	if err != nil {
		return nil, err
	}
	source, err := s.cfg.Endorsements.Open("none")
	if err != nil {
		return nil, failure.New(failure.Configuration, fmt.Errorf("endorsements: %w", err), "")
	}
	defer source.Close()
	issuers, err := s.cfg.issuers(ctx, source, s.log)
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", s.cfg.Listen)
	if err != nil {
		return nil, listenError(s.cfg.Listen, err)
	}
	gate := atls.NewGate(listener, atls.GateLimits{Waiting: s.cfg.MaxUnattested, Attested: s.cfg.MaxAttested, Each: s.cfg.MaxConnectionsEach})
	defer gate.Close()
	webDone := func() error { return nil }
	if s.cfg.Metrics != "" {
		l, err := localweb.Listen(s.cfg.Metrics, s.cfg.MetricsRemote)
		if err != nil {
			return nil, err
		}
		webCtx, stop := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- localweb.Serve(webCtx, l, s.web()) }()
		webDone = func() error { stop(); return errors.Join(<-done, ignoreClosed{l}.Close()) }
	}
	s.log.Warn("sealed: nobody gets a key before its operators have given their shares", "address", gate.Addr().String(), "split", s.sealed.ID(), "needed", s.sealed.Threshold)
	listening()
	strangers := newStrangers(time.Now)
	master, err := unseal.NewServer(s.gather, len(issuers) > 0, s.log, strangers.allow).Serve(ctx, gate, &atls.ServerConfig{
		Certificate: func() (*tls.Certificate, error) { return s.cert.Load(), nil }, Anyone: true, Issuers: issuers, Timeout: timeout,
	})
	if master != nil {
		defer master.Close()
	}
	if err := errors.Join(err, webDone()); err != nil {
		return nil, err
	}
	server, err := newServer(ctx, s.cfg, s.log, master)
	for failure.Of(err).Class == failure.Unreachable && err != nil {
		// Nobody is asked for a share again because a storage is not there at the moment.
		s.log.Error("unsealed, and a service that is needed does not answer; trying again", "error", err)
		select {
		case <-time.After(againAfter):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		server, err = newServer(ctx, s.cfg, s.log, master)
	}
	if err != nil {
		return nil, err
	}
	if err := server.service.audit.Append(audit.Entry{
		Event: "unseal", CorrelationID: newID(), Result: "allowed", Detail: fmt.Sprintf("split %s, shares %s", s.sealed.ID(), s.gather.Used()),
	}); err != nil {
		return nil, errors.Join(auditError(err), server.close())
	}
	return server, nil
}

// web answers that the process is well, and gives nothing.
func (s *Sealed) web() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, s.String(), http.StatusServiceUnavailable)
	})
	return mux
}

// Close wipes what was given. It is for one that does not serve.
func (s *Sealed) Close() error { return s.gather.Close() }
