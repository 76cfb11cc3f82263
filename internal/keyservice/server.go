package keyservice

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	replicav1 "github.com/keyagent/keyagent/api/keyagent/replica/v1"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/localweb"
	"github.com/keyagent/keyagent/internal/policysource"
	"github.com/keyagent/keyagent/internal/wire"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/setup"
)

// Server is a key service on its listeners.
type Server struct {
	cfg       *Config
	master    *kms.Secret // of the cluster KMS, if it was given, or may be given to replicas
	joined    string      // who gave it, if that was a replica
	peers     *peers      // nil: none are asked
	heard     chan struct{}
	log       *slog.Logger
	policy    *policysource.Source
	service   *Service
	metrics   *Metrics
	gate      *atls.Gate
	grpc      *grpc.Server
	web       net.Listener
	admin     net.Listener
	closers   []io.Closer
	cert      atomic.Pointer[tls.Certificate]
	strangers *strangers
	stopping  atomic.Bool
	confined  bool // to the files that were named at the start
}

// NewServer opens everything that the configuration names and starts to listen,
// but accepts nothing before Run.
func NewServer(ctx context.Context, cfg *Config, log *slog.Logger) (_ *Server, err error) {
	return newServer(ctx, cfg, log, nil, "")
}

func newServer(ctx context.Context, cfg *Config, log *slog.Logger, master *kms.Secret, joined string) (_ *Server, err error) {
	s := &Server{cfg: cfg, master: master, joined: joined, log: log, strangers: newStrangers(time.Now)}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.policy, err = policysource.New(cfg.Policy, log); err != nil {
		return nil, failure.New(failure.Configuration, err, "keyagent policy check says what is wrong")
	}
	if err = s.loadCertificate(); err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return nil, listenError(cfg.Listen, err)
	}
	s.gate = atls.NewGate(listener, atls.GateLimits{Waiting: cfg.MaxUnattested, Attested: cfg.MaxAttested, Each: cfg.MaxConnectionsEach})
	s.closers = append(s.closers, ignoreClosed{s.gate})
	s.metrics = NewMetrics(s.gate)
	if cfg.Metrics != "" {
		if s.web, err = localweb.Listen(cfg.Metrics, cfg.MetricsRemote); err != nil {
			return nil, err
		}
		s.closers = append(s.closers, ignoreClosed{s.web})
	}
	if err = s.openService(ctx); err != nil {
		return nil, err
	}
	if err = s.openAdmin(); err != nil {
		return nil, err
	}
	return s, s.wire(ctx)
}

func listenError(address string, err error) error {
	hint := ""
	if errors.Is(err, syscall.EADDRINUSE) {
		hint = "another process has that port; choose another one with listen or --listen"
	}
	return failure.New(failure.Configuration, fmt.Errorf("listen on %s: %w", address, err), hint)
}

func (s *Server) loadCertificate() error {
	cert, err := loadCertificate(s.cfg)
	if err == nil {
		s.cert.Store(cert)
	}
	return err
}

func loadCertificate(cfg *Config) (*tls.Certificate, error) {
	if err := config.CheckSecretFile(cfg.TLS.Key); err != nil {
		return nil, failure.New(failure.Configuration, fmt.Errorf("tls key: %w", err), "")
	}
	cert, err := tls.LoadX509KeyPair(cfg.TLS.Certificate, cfg.TLS.Key)
	if err != nil {
		return nil, failure.New(failure.Configuration, fmt.Errorf("tls certificate: %w", err), "")
	}
	return &cert, nil
}

// openKMS opens the KMS in force with those that only open keys.
func (s *Server) openKMS(ctx context.Context) (kms.KMS, error) {
	var all []kms.KMS
	for i, uri := range append([]string{s.cfg.KMS}, s.cfg.OldKMS...) {
		name := "kms"
		if i > 0 {
			name = fmt.Sprintf("old_kms[%d]", i-1)
		}
		open := func() (setup.Keys, error) { return setup.KMS(ctx, uri) }
		if i == 0 && s.master != nil {
			open = func() (setup.Keys, error) { return setup.Unsealed(ctx, uri, s.master) }
		}
		k, err := open()
		if err != nil {
			return nil, BackendError(fmt.Errorf("%s: %w", name, err))
		}
		s.closers = append(s.closers, k)
		all = append(all, observeKMS(k, uri, s.metrics))
	}
	return kms.WithOld(all[0], all[1:]...), nil
}

// keepMaster keeps the master secret for replicas, if the policy has any. Otherwise nothing of
// it stays but what the KMS made of it.
func (s *Server) keepMaster(ctx context.Context) (err error) {
	if len(s.policy.Current().Replicas()) == 0 {
		return nil
	}
	if s.master != nil {
		s.master, err = s.master.Clone() // whose it was closes it
	} else if s.master, err = setup.MasterSecret(ctx, s.cfg.KMS); err != nil {
		err = BackendError(fmt.Errorf("kms: %w", err))
	}
	if s.master != nil {
		s.closers = append(s.closers, s.master)
	}
	return err
}

func (s *Server) wire(ctx context.Context) error {
	source, err := s.cfg.Endorsements.Open("none")
	if err != nil {
		return failure.New(failure.Configuration, fmt.Errorf("endorsements: %w", err), "")
	}
	s.closers = append(s.closers, source)
	memory, err := s.cfg.Endorsements.Memory()
	if err != nil {
		return failure.New(failure.Configuration, fmt.Errorf("endorsements: %w", err), "")
	}
	s.closers = append(s.closers, memory)
	peers, err := s.policy.Peers(source, memory)
	if err != nil {
		return err
	}
	timeout, err := s.cfg.timeout()
	if err != nil {
		return err
	}
	cfg := &atls.ServerConfig{
		Certificate: func() (*tls.Certificate, error) { return s.cert.Load(), nil },
		Clients:     peers,
		Observe:     s.observe,
		Timeout:     timeout,
	}
	if cfg.Issuers, err = s.cfg.issuers(ctx, source, s.log); err != nil {
		return err
	}
	s.grpc = grpc.NewServer(
		grpc.Creds(atls.NewServerCredentials(cfg)),
		grpc.ForceServerCodecV2(wire.Codec()),
		grpc.ConnectionTimeout(timeout),
		grpc.MaxRecvMsgSize(atls.MaxFrame),
		grpc.MaxConcurrentStreams(16),
		grpc.MaxHeaderListSize(16<<10),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: time.Hour, Time: 2 * time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 30 * time.Second}),
	)
	keyservicev1.RegisterKeyServiceServer(s.grpc, s.service)
	if len(s.policy.Current().Replicas()) > 0 {
		if len(cfg.Issuers) == 0 {
			s.log.Warn("the policy has replicas, and this key service proves nothing: no replica will take anything from it", "hint", "evidence: in the configuration")
		}
		replicav1.RegisterReplicaServer(s.grpc, &replicas{Service: s.service})
	}
	if s.peers, err = s.cfg.newPeers(s.policy, source, memory, cfg.Issuers, s.cert.Load, s.log); s.peers != nil {
		s.closers = append(s.closers, s.peers)
		s.peers.refuses = func(ctx context.Context, identities []string) error {
			return s.service.mustNotBeRevoked(ctx, identities, "")
		}
		s.heard = make(chan struct{})
		s.service.heard = s.heard
	}
	return err
}

// observe records the outcome of each attestation: the full difference here,
// only the class at the peer.
func (s *Server) observe(o atls.Outcome) {
	s.metrics.attested(o.Err)
	entry := audit.Entry{Event: "attest", CorrelationID: o.CorrelationID, Remote: o.Remote, Policy: s.policy.Current().Hash(), Result: "allowed"}
	if o.Peer != nil {
		entry.Identity, entry.Evidence = o.Peer.Identity(), evidenceDigest(o.Peer)
	}
	log := s.log
	if o.Peer == nil {
		withheld, ok := s.strangers.allow()
		if !ok {
			return
		}
		if withheld > 0 {
			log = log.With("withheld", withheld)
		}
	}
	for _, dropped := range o.Dropped {
		log.Warn("evidence of one kind was refused, and left out", "correlation_id", o.CorrelationID, "remote", o.Remote, "error", brief(dropped))
	}
	if o.Err == nil {
		s.log.Info("attested", "correlation_id", o.CorrelationID, "remote", o.Remote, "identity", entry.Identity)
		return // the request that follows is the decision
	}
	if o.Ended {
		log.Info("connection ended before its attestation", "remote", o.Remote, "error", brief(o.Err))
		return
	}
	attrs := []any{"correlation_id", o.CorrelationID, "remote", o.Remote, "identity", entry.Identity, "error", brief(o.Err)}
	var m *policy.MismatchError
	if errors.As(o.Err, &m) {
		attrs = append(attrs, "profile", m.Profile, "mismatches", m.Mismatches)
	}
	log.Warn("attestation refused", attrs...)
	if o.Peer == nil {
		return // nobody in particular: the log must not grow at a stranger's will
	}
	entry.Result, entry.Class, entry.Detail = "refused", string(failure.EvidenceRefused), brief(o.Err)
	if err := s.service.audit.Append(entry); err != nil {
		s.log.Error("the audit log does not take entries", "error", err)
	}
}

// Addr returns the address that the service listens on.
func (s *Server) Addr() net.Addr { return s.gate.Addr() }

// MetricsAddr returns the address of /metrics, or nil.
func (s *Server) MetricsAddr() net.Addr {
	if s.web == nil {
		return nil
	}
	return s.web.Addr()
}

// Reload reads the policy and the certificate again. What fails stays as it is.
func (s *Server) Reload() error {
	err := s.outOfReach(errors.Join(s.policy.Reload(), s.loadCertificate()))
	s.metrics.reloaded(err)
	return err
}

// stopTimeout bounds how long requests under way may still take.
const stopTimeout = 10 * time.Second

// Run serves until ctx ends, then lets requests under way finish and closes
// everything.
func (s *Server) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := s.grpc.Serve(s.gate); !errors.Is(err, grpc.ErrServerStopped) {
			return err
		}
		return nil
	})
	if s.peers != nil {
		group.Go(func() error {
			first, cancel := context.WithTimeout(ctx, beforeServing)
			s.peers.exchange(first, s.service)
			cancel()
			close(s.heard)
			s.peers.loop(ctx, s.service)
			return nil
		})
	}
	if s.web != nil {
		group.Go(func() error { return localweb.Serve(ctx, s.web, s.metrics.handler(s.ready)) })
	}
	group.Go(func() error { s.service.forget.loop(ctx); return nil })
	if s.admin != nil {
		s.serveAdmin(ctx, group)
	}
	if every, err := s.cfg.rewrapEvery(); err == nil && every > 0 {
		group.Go(func() error { s.service.rewrapLoop(ctx, every); return nil })
	}
	group.Go(func() error {
		<-ctx.Done()
		s.stopping.Store(true)
		force := time.AfterFunc(stopTimeout, s.grpc.Stop)
		defer force.Stop()
		s.grpc.GracefulStop()
		return nil
	})
	return errors.Join(group.Wait(), s.close())
}

func (s *Server) ready() error {
	if s.stopping.Load() {
		return errors.New("stopping")
	}
	select {
	case <-s.heard:
	default:
		if s.peers != nil {
			return errors.New("asking replicas what they have seen")
		}
	}
	// Without its log the service refuses everybody, until it starts again.
	return errors.Join(s.service.audit.Err(), s.service.book.err())
}

// Close gives back everything that NewServer opened. It is for a server that
// does not run.
func (s *Server) Close() error { return s.close() }

// close gives back everything in the reverse order of opening.
func (s *Server) close() error {
	var err error
	for i := len(s.closers) - 1; i >= 0; i-- {
		err = errors.Join(err, s.closers[i].Close())
	}
	s.closers = nil
	return err
}

// ignoreClosed lets a listener be closed twice.
type ignoreClosed struct{ io.Closer }

func (c ignoreClosed) Close() error {
	if err := c.Closer.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
