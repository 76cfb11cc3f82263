package keyservice

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/policysource"
	"github.com/keyagent/keyagent/internal/replica"
	"github.com/keyagent/keyagent/kms"
)

const (
	// askTimeout bounds what one peer may take to prove itself and to answer, and roundTimeout
	// all of them where a KMS has the secret too: the unit gives a start two minutes.
	askTimeout   = 20 * time.Second
	roundTimeout = 40 * time.Second
	// Between two rounds in which no peer gave the master secret.
	firstPause, lastPause = time.Second, 15 * time.Second
	// exchangeEvery is between two exchanges of what was seen, and beforeServing bounds the
	// first of them, for which the service waits.
	exchangeEvery = 30 * time.Second
	beforeServing = 10 * time.Second
)

// peers are the other key services over the storage that this one asks.
type peers struct {
	all    []*endpoint
	policy *policysource.Source
	tls    atls.ClientConfig // without what is each peer's own
	cert   func() *tls.Certificate
	log    *slog.Logger
	after  func(time.Duration) <-chan time.Time
	// refuses is why a machine that proved itself is not believed. Nil before there are records.
	refuses func(ctx context.Context, identities []string) error
}

// endpoint is one of them. It is used by one goroutine at a time.
type endpoint struct {
	keyclient.Server
	session *replica.Session // on which knowledge is exchanged, if there is one
	said    failure.Class    // of the failure that the log has already
}

// newPeers is nil for a configuration that names none. Both sides must prove themselves.
func (c *Config) newPeers(policy *policysource.Source, source endorsement.Source, memory *endorsement.Memory, issuers []attestation.Issuer,
	cert func() *tls.Certificate, log *slog.Logger) (*peers, error) {
	if len(c.Join) == 0 {
		return nil, nil
	}
	if err := mayJoin(policy); err != nil {
		return nil, err
	}
	demand, err := policy.Replicas(source, memory)
	if err != nil {
		return nil, err
	}
	identity, err := atls.NewIdentity()
	if err != nil {
		return nil, err
	}
	p := &peers{policy: policy, cert: cert, log: log, after: time.After,
		tls: atls.ClientConfig{Identity: identity, Issuers: issuers, Server: demand, Timeout: askTimeout}}
	for i := range c.Join {
		p.all = append(p.all, &endpoint{Server: c.Join[i].Server()})
	}
	return p, nil
}

// mayJoin refuses a policy by which no peer could be the right one.
func mayJoin(policy *policysource.Source) error {
	if len(policy.Current().Replicas()) == 0 {
		return failure.Newf(failure.Configuration, "name their profiles: replicas: {profiles: [...]}", "join: is set, and the policy has no replicas")
	}
	return nil
}

func (p *peers) dial(ctx context.Context, to *endpoint) (*replica.Session, error) {
	cfg := p.tls
	cfg.ServerName, cfg.RootCAs, cfg.PinnedSPKI = to.Name, to.Roots, to.Pins
	if cfg.RootCAs == nil && len(cfg.PinnedSPKI) == 0 {
		// Key services behind one name have one certificate.
		cfg.PinnedSPKI = [][32]byte{sha256.Sum256(p.cert().Leaf.RawSubjectPublicKeyInfo)}
	}
	return replica.Dial(ctx, to.Address, &cfg)
}

// ask asks one peer after the other for the master secret, once. The caller closes it; who says
// whose it is. It is nil if none gives it.
func (p *peers) ask(ctx context.Context) (master *kms.Secret, who string) {
	for _, to := range p.all {
		var err error
		if master, who, err = p.askOne(ctx, to); err == nil {
			p.log.Info("a replica gave the master secret", "replica", to.Address, "identity", who)
			return master, fmt.Sprintf("the replica %s, %s", to.Address, who)
		}
		p.say(to, "a replica does not give the master secret", err)
	}
	return nil, ""
}

func (p *peers) askOne(ctx context.Context, to *endpoint) (*kms.Secret, string, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	s, err := p.dial(ctx, to)
	if err != nil {
		return nil, "", err
	}
	defer s.Close()
	v, err := s.Peer()
	if err != nil {
		return nil, "", err
	}
	master, err := s.Join(ctx)
	return master, v.Identity(), err
}

// askUntil asks until a peer gives the master secret, or ctx ends: nil.
func (p *peers) askUntil(ctx context.Context) (master *kms.Secret, who string) {
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		if master, who = p.ask(ctx); master != nil {
			return master, who
		}
		select {
		case <-ctx.Done():
			return nil, ""
		case <-p.after(jitter(pause)):
		}
	}
}

// jitter keeps key services that started at the same moment from asking at the same moment.
func jitter(d time.Duration) time.Duration { return d*3/4 + rand.N(d/2) }

// say logs what went wrong with a peer, when that is news.
func (p *peers) say(to *endpoint, what string, err error) {
	if err == nil {
		if to.said != "" {
			p.log.Info("a replica answers again", "replica", to.Address)
		}
		to.said = ""
		return
	}
	f := failure.Of(err)
	if f.Class == to.said {
		return
	}
	to.said = f.Class
	p.log.Warn(what, "replica", to.Address, "class", f.Class, "error", brief(err), "hint", f.Hint, "correlation_id", f.CorrelationID)
}

// exchange tells all peers what was seen of volumes, and learns what they have seen.
func (p *peers) exchange(ctx context.Context, book replica.Book) {
	var wait sync.WaitGroup
	for _, with := range p.all {
		wait.Go(func() { p.exchangeWith(ctx, with, book) })
	}
	wait.Wait()
}

func (p *peers) exchangeWith(ctx context.Context, with *endpoint, book replica.Book) {
	again := with.session != nil
	err := p.tryExchange(ctx, with, book)
	if err != nil && again {
		err = p.tryExchange(ctx, with, book) // the verdict on one of both had ended
	}
	// A service that stops says nothing; one whose first exchange takes too long does.
	if !errors.Is(ctx.Err(), context.Canceled) {
		p.say(with, "what was seen of volumes is not exchanged with a replica", err)
	}
}

func (p *peers) tryExchange(ctx context.Context, with *endpoint, book replica.Book) (err error) {
	if with.session == nil {
		dialing, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		if with.session, err = p.dial(dialing, with); err != nil {
			return err
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, with.close())
		}
	}()
	v, err := with.session.Peer()
	if err != nil {
		return err
	}
	// The policy in force decides, and not the one of the handshake.
	if age, most := time.Since(v.At()), p.policy.Current().Lifetime(); age >= most {
		return failure.New(failure.EvidenceRefused, fmt.Errorf("%w: the evidence is %s old", atls.ErrExpired, age.Round(time.Second)), "")
	}
	if err := p.policy.Replica(v); err != nil {
		return failure.New(failure.ServerUntrusted, err, "its profile has to be listed in replicas, in the policy of this key service")
	}
	if p.refuses != nil {
		if err := p.refuses(ctx, v.Identities()); err != nil {
			return failure.New(failure.Revoked, err, "an operator revoked it by name: leave it out of join")
		}
	}
	return with.session.Exchange(ctx, book)
}

func (p *endpoint) close() error {
	s := p.session
	p.session = nil
	if s == nil {
		return nil
	}
	return s.Close()
}

// loop exchanges until ctx ends, with each peer at its own pace.
func (p *peers) loop(ctx context.Context, book replica.Book) {
	var wait sync.WaitGroup
	for _, with := range p.all {
		wait.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case <-p.after(jitter(exchangeEvery)):
					p.exchangeWith(ctx, with, book)
				}
			}
		})
	}
	wait.Wait()
}

// Close ends the connections.
func (p *peers) Close() error {
	var err error
	for _, one := range p.all {
		err = errors.Join(err, one.close())
	}
	return err
}
