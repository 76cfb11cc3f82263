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

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/localweb"
	"github.com/keyagent/keyagent/internal/policysource"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/shares"
	"github.com/keyagent/keyagent/internal/unseal"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/setup"
)

// Sealed is a key service without its master secret, which its operators have in shares, or other
// key services give. It takes that, and does nothing else.
type Sealed struct {
	cfg    *Config
	log    *slog.Logger
	sealed *shares.Sealed       // nil: no operator has shares
	gather *unseal.Gatherer     // of those
	policy *policysource.Source // by which replicas are asked, nil if none are
	cert   atomic.Pointer[tls.Certificate]
}

// OpenSealed returns the key service of a configuration that names a sealed master secret, or
// others to ask for it; nil if it has its master secret, or none.
func OpenSealed(cfg *Config, log *slog.Logger) (*Sealed, error) {
	path := setup.SealedFile(cfg.KMS)
	asks := setup.Joined(cfg.KMS) || setup.WrappedFile(cfg.KMS) != "" && len(cfg.Join) > 0
	if path == "" && !asks {
		return nil, nil
	}
	s := &Sealed{cfg: cfg, log: log}
	if path != "" {
		data, err := config.ReadPublicFile(path, shares.MaxSealed)
		if err != nil {
			return nil, failure.New(failure.Configuration, fmt.Errorf("kms: %w", err), "keyagent kms split makes it")
		}
		if s.sealed, err = shares.ParseSealed(data); err != nil {
			return nil, failure.New(failure.Configuration, fmt.Errorf("kms: %s: %w", path, err), "it is the file master.sealed of keyagent kms split")
		}
		s.gather = unseal.NewGatherer(s.sealed, time.Now)
	}
	err := s.Reload()
	if err == nil && len(cfg.Join) > 0 {
		s.policy, err = policysource.New(cfg.Policy, log)
		err = failure.New(failure.Configuration, err, "keyagent policy check says what is wrong")
	}
	return s, err
}

// Waits reports that there may be nobody but people and other key services to give the master
// secret. Otherwise a KMS does, which is asked when no replica gives it.
func (s *Sealed) Waits() bool { return setup.WrappedFile(s.cfg.KMS) == "" }

// Reload reads the certificate again. What does not load leaves the one in force.
func (s *Sealed) Reload() error {
	cert, err := loadCertificate(s.cfg)
	if err == nil {
		s.cert.Store(cert)
	}
	if s.policy != nil {
		err = errors.Join(err, s.policy.Reload())
	}
	return err
}

// String says what is waited for.
func (s *Sealed) String() string {
	if s.sealed == nil {
		return "sealed: no replica gives the master secret"
	}
	p := s.gather.Progress()
	text := fmt.Sprintf("sealed: %d of %d shares", p.Have, p.Threshold)
	if len(s.cfg.Join) > 0 {
		text += ", and no replica gives the master secret"
	}
	return text
}

// Check looks at what can be looked at without the master secret, so that operators are not asked
// for their shares in vain. With all it opens the storage and the other KMSs as well.
func (s *Sealed) Check(ctx context.Context, all bool) error {
	policy, err := policysource.New(s.cfg.Policy, slog.New(slog.DiscardHandler))
	if err != nil {
		return failure.New(failure.Configuration, err, "keyagent policy check says what is wrong")
	}
	if len(s.cfg.Join) > 0 {
		if err := mayJoin(policy); err != nil {
			return err
		}
	}
	for i, uri := range s.cfg.OldKMS {
		if setup.SealedFile(uri) != "" || setup.Joined(uri) {
			return failure.Newf(failure.Configuration, "put its master secret together with keyagent kms combine", "old_kms[%d] names a master secret that is sealed, or with other key services, and only that of kms is taken", i)
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

// Unseal waits until operators have given enough shares, or a replica the master secret, and
// returns the key service then, as NewServer does. waiting is called once, when it is all that is
// done.
func (s *Sealed) Unseal(ctx context.Context, waiting func()) (*Server, error) {
	defer s.Close()
	if err := s.Check(ctx, false); err != nil {
		return nil, err
	}
	source, err := s.cfg.Endorsements.Open("none")
	if err != nil {
		return nil, failure.New(failure.Configuration, fmt.Errorf("endorsements: %w", err), "")
	}
	defer source.Close()
	memory, err := s.cfg.Endorsements.Memory()
	if err != nil {
		return nil, failure.New(failure.Configuration, fmt.Errorf("endorsements: %w", err), "")
	}
	defer memory.Close()
	issuers, err := s.cfg.issuers(ctx, source, s.log)
	if err != nil {
		return nil, err
	}
	peers, err := s.cfg.newPeers(s.policy, source, memory, issuers, s.cert.Load, s.log)
	if err != nil {
		return nil, err
	}
	if !s.Waits() {
		asking, cancel := context.WithTimeout(ctx, roundTimeout)
		defer cancel()
		master, who := peers.ask(asking)
		return s.start(ctx, master, who)
	}
	master, who, err := s.obtain(ctx, peers, issuers, waiting)
	if err != nil {
		return nil, err
	}
	return s.start(ctx, master, who)
}

// obtain waits for the master secret. who is the replica that gave it, if one did.
func (s *Sealed) obtain(ctx context.Context, peers *peers, issuers []attestation.Issuer, waiting func()) (master *kms.Secret, who string, err error) {
	if s.cfg.Metrics != "" {
		l, listenErr := localweb.Listen(s.cfg.Metrics, s.cfg.MetricsRemote)
		if listenErr != nil {
			return nil, "", listenErr
		}
		webCtx, stop := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- localweb.Serve(webCtx, l, s.web()) }()
		defer func() {
			stop()
			if webErr := errors.Join(<-done, ignoreClosed{l}.Close()); webErr != nil && master != nil {
				err = errors.Join(webErr, master.Close())
				master = nil
			}
		}()
	}
	if s.sealed == nil {
		s.log.Warn("sealed: nobody gets a key before a replica has given the master secret")
		waiting()
		if master, who = peers.askUntil(ctx); master == nil {
			return nil, "", ctx.Err()
		}
		return master, who, nil
	}
	asking, stop := context.WithCancel(ctx)
	given := make(chan string, 1)
	go func() {
		defer close(given)
		if peers == nil {
			return
		}
		if master, who := peers.askUntil(asking); master != nil {
			first, err := s.gather.Take(master)
			if first {
				given <- who
			}
			if err != nil {
				s.log.Error("could not wipe a share", "error", err)
			}
		}
	}()
	master, err = s.takeShares(ctx, issuers, waiting)
	stop()
	return master, <-given, err
}

// takeShares serves until the master secret is there.
func (s *Sealed) takeShares(ctx context.Context, issuers []attestation.Issuer, waiting func()) (*kms.Secret, error) {
	timeout, err := s.cfg.timeout()
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", s.cfg.Listen)
	if err != nil {
		return nil, listenError(s.cfg.Listen, err)
	}
	gate := atls.NewGate(listener, atls.GateLimits{Waiting: s.cfg.MaxUnattested, Attested: s.cfg.MaxAttested, Each: s.cfg.MaxConnectionsEach})
	defer gate.Close()
	s.log.Warn("sealed: nobody gets a key before its operators have given their shares", "address", gate.Addr().String(), "split", s.sealed.ID(), "needed", s.sealed.Threshold)
	waiting()
	strangers := newStrangers(time.Now)
	return unseal.NewServer(s.gather, len(issuers) > 0, s.log, strangers.allow).Serve(ctx, gate, &atls.ServerConfig{
		Certificate: func() (*tls.Certificate, error) { return s.cert.Load(), nil }, Anyone: true, Issuers: issuers, Timeout: timeout,
	})
}

// start opens the key service with its master secret, which it closes. Without one it is where the
// configuration says.
func (s *Sealed) start(ctx context.Context, master *kms.Secret, who string) (*Server, error) {
	if master == nil {
		return newServer(ctx, s.cfg, s.log, nil, "")
	}
	defer master.Close()
	server, err := newServer(ctx, s.cfg, s.log, master, who)
	for failure.Of(err).Class == failure.Unreachable && err != nil {
		// Nobody is asked for a share again because a storage is not there at the moment.
		s.log.Error("unsealed, and a service that is needed does not answer; trying again", "error", err)
		select {
		case <-time.After(againAfter):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		server, err = newServer(ctx, s.cfg, s.log, master, who)
	}
	if err != nil {
		return nil, err
	}
	entry := audit.Entry{Event: "unseal", CorrelationID: newID(), Result: "allowed", Detail: "the master secret came from " + who}
	if who == "" {
		entry.Detail = fmt.Sprintf("split %s, shares %s", s.sealed.ID(), s.gather.Used())
	}
	if err := server.service.audit.Append(entry); err != nil {
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
func (s *Sealed) Close() error {
	if s.gather == nil {
		return nil
	}
	return s.gather.Close()
}
