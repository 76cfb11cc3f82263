package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/luks"
)

// Key is what the key service released for one volume. Close wipes the DEK.
type Key struct {
	DEK           *secret.Bytes
	Pending       bool // the header was never confirmed
	Identity      luks.Identity
	KeyVersion    uint32
	HeaderMAC     luks.MAC // zero while pending
	CorrelationID string
	Expires       time.Time // of the verdict under which it was released
}

// Close wipes the DEK.
func (k *Key) Close() error { return k.DEK.Close() }

// KeySource is where volume keys come from.
type KeySource interface {
	// GetKey returns the key of a volume; with format, of one that may not
	// exist yet. The caller closes it.
	GetKey(ctx context.Context, volume string, format bool) (*Key, error)
	// Confirm reports that the header of a pending volume is on the disk.
	Confirm(ctx context.Context, k *Key, mac luks.MAC) error
}

// Progress is told what is going on, for systemd and for the log.
type Progress func(step string, took time.Duration)

// Client is the key service as a KeySource: several endpoints, tried in turn,
// again and again with growing and jittered pauses until a budget is used up.
// Only what another try may change is tried again.
type Client struct {
	retry     RetryConfig
	endpoints []*endpoint
	log       *slog.Logger
	progress  Progress
	wait      func(ctx context.Context, d time.Duration) error

	mu        sync.Mutex
	preferred int // the endpoint that answered last
}

// endpoint is one address of the key service, and the session with it.
type endpoint struct {
	address string
	cfg     *atls.ClientConfig
	issuers func(context.Context) ([]attestation.Issuer, error)
	log     *slog.Logger

	mu      sync.Mutex
	current *session
}

// session is one attested connection. It is never repaired: whatever goes wrong
// with it ends it, and the next call attests anew.
type session struct {
	channel *atls.Channel
	conn    *grpc.ClientConn
	service keyservicev1.KeyServiceClient
}

// ClientOptions configure [NewClient].
type ClientOptions struct {
	Config *Config
	// Issuers returns this machine's evidence, for each connection anew: a driver
	// may come late, and a connection shows what is there then. Required.
	Issuers  func(context.Context) ([]attestation.Issuer, error)
	Server   *atls.Peers // nil unless the service must attest itself
	Log      *slog.Logger
	Progress Progress
	// Timeout bounds one handshake with its attestation. Default
	// atls.DefaultTimeout.
	Timeout time.Duration
}

// NewClient connects to nothing yet. The caller closes the client.
func NewClient(opts ClientOptions) (*Client, error) {
	id, err := atls.NewIdentity()
	if err != nil {
		return nil, err
	}
	c := &Client{retry: opts.Config.Retry, log: opts.Log, progress: opts.Progress, wait: wait}
	for i := range opts.Config.Servers {
		s := &opts.Config.Servers[i]
		c.endpoints = append(c.endpoints, &endpoint{address: s.Address, log: opts.Log, issuers: opts.Issuers, cfg: &atls.ClientConfig{
			ServerName: s.Name, RootCAs: s.roots, PinnedSPKI: s.pins,
			Identity: id, Server: opts.Server, Timeout: opts.Timeout,
		}})
	}
	return c, nil
}

// dialTimeout bounds how long an address may take to answer at all.
const dialTimeout = 10 * time.Second

// renewBefore the end of a verdict, the session is attested again.
const renewBefore = 30 * time.Second

// callTimeout bounds one request in a session.
const callTimeout = 30 * time.Second

// session returns the session, attested and with some time left, and whether
// its attestation is of this moment.
func (e *endpoint) session(ctx context.Context) (s *session, fresh bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if s := e.current; s != nil {
		if time.Until(s.channel.Verdict().Expires) > renewBefore {
			return s, false, nil
		}
		if err := s.renew(ctx); err == nil {
			return s, true, nil
		}
		e.drop()
	}
	if s, err = e.connect(ctx); err != nil {
		return nil, false, err
	}
	e.current = s
	return s, true, nil
}

func (e *endpoint) connect(ctx context.Context) (*session, error) {
	raw, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", e.address)
	if err != nil {
		return nil, failure.New(failure.Unreachable, err, "is the key service running, and does this network reach it?")
	}
	started := time.Now()
	cfg := *e.cfg
	if cfg.Issuers, err = e.issuers(ctx); err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	conn, err := atls.Client(ctx, raw, &cfg)
	if err != nil {
		return nil, err
	}
	logStep(e.log, "attested", time.Since(started))
	// gRPC gets this connection and no other: when it ends, so does the session.
	handover := make(chan net.Conn, 1)
	handover <- conn
	client, err := grpc.NewClient("passthrough:///"+e.address,
		grpc.WithTransportCredentials(atls.EstablishedCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-handover:
				return c, nil
			default:
				return nil, errors.New("the connection to the key service ended")
			}
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(atls.MaxFrame)),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
		// A peer that went away without a word is noticed; an idle session stays.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: time.Minute, Timeout: 10 * time.Second}),
		grpc.WithIdleTimeout(0),
	)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return &session{conn.Channel(), client, keyservicev1.NewKeyServiceClient(client)}, nil
}

// renew runs the attestation again on the same connection.
func (s *session) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, atls.DefaultTimeout)
	defer cancel()
	stream, err := s.service.Reattest(ctx)
	if err != nil {
		return err
	}
	return s.channel.Reattest(ctx, stream)
}

// drop ends the session. The lock is held.
func (e *endpoint) drop() {
	if e.current != nil {
		_ = e.current.conn.Close()
		e.current = nil
	}
}

// call runs f in a session. An error that says nothing of the key service's
// decision ends the session, and so does a refusal of its evidence: the policy
// may have changed since, and evidence of this moment may fit it.
func (e *endpoint) call(ctx context.Context, f func(context.Context, *session) error) error {
	for {
		s, fresh, err := e.session(ctx)
		if err != nil {
			return classify(err)
		}
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		err = classify(f(callCtx, s))
		cancel()
		if err == nil {
			return nil
		}
		refused := failure.Of(err).Class == failure.EvidenceRefused
		if refused || !isAnswer(err) {
			e.mu.Lock()
			if e.current == s {
				e.drop()
			}
			e.mu.Unlock()
		}
		if !refused || fresh {
			return err
		}
	}
}

// Close closes the connections.
func (c *Client) Close() error {
	for _, e := range c.endpoints {
		e.mu.Lock()
		e.drop()
		e.mu.Unlock()
	}
	return nil
}

// GetKey implements KeySource.
func (c *Client) GetKey(ctx context.Context, volume string, format bool) (*Key, error) {
	op := keyservicev1.Operation_OPERATION_OPEN
	if format {
		op = keyservicev1.Operation_OPERATION_FORMAT
	}
	var key *Key
	err := c.inSession(ctx, func(ctx context.Context, s *session) error {
		resp, err := s.service.GetKey(ctx, &keyservicev1.GetKeyRequest{VolumeId: volume, Operation: op})
		if err != nil {
			return failure.FromStatus(err)
		}
		key, err = openKey(s.channel, volume, op, resp)
		return err
	})
	return key, err
}

func openKey(ch *atls.Channel, volume string, op keyservicev1.Operation, resp *keyservicev1.GetKeyResponse) (*Key, error) {
	k := &Key{
		Pending:    resp.GetState() == keyservicev1.VolumeState_VOLUME_STATE_PENDING,
		Identity:   luks.Identity{Volume: volume, UUID: resp.GetLuksUuid(), Generation: resp.GetGeneration()},
		KeyVersion: resp.GetKeyVersion(), CorrelationID: resp.GetCorrelationId(),
		Expires: ch.Verdict().Expires,
	}
	switch {
	case k.Pending && op == keyservicev1.Operation_OPERATION_FORMAT && len(resp.GetHeaderMac()) == 0:
	case resp.GetState() == keyservicev1.VolumeState_VOLUME_STATE_ACTIVE && len(resp.GetHeaderMac()) == len(k.HeaderMAC):
		k.HeaderMAC = luks.MAC(resp.GetHeaderMac())
	default:
		return nil, failure.Newf(failure.State, "", "the key service's answer makes no sense: state %v, header MAC of %d bytes", resp.GetState(), len(resp.GetHeaderMac()))
	}
	var err error
	if k.DEK, err = ch.Open(keyservicev1.SealInfo(volume, op, resp), resp.GetSealedDek()); err != nil {
		return nil, failure.New(failure.WrongKey, fmt.Errorf("sealed key: %w", err), "")
	}
	return k, nil
}

// Confirm implements KeySource.
func (c *Client) Confirm(ctx context.Context, k *Key, mac luks.MAC) error {
	return c.inSession(ctx, func(ctx context.Context, s *session) error {
		_, err := s.service.ConfirmVolume(ctx, &keyservicev1.ConfirmVolumeRequest{
			VolumeId: k.Identity.Volume, Generation: k.Identity.Generation, KeyVersion: k.KeyVersion, HeaderMac: mac[:],
		})
		if err != nil {
			return failure.FromStatus(err)
		}
		return nil
	})
}

// inSession calls f in an attested session with some endpoint.
func (c *Client) inSession(ctx context.Context, f func(context.Context, *session) error) error {
	return c.try(ctx, func(ctx context.Context, e *endpoint) error { return e.call(ctx, f) })
}

// try calls f with one endpoint after the other until one succeeds, one gives
// an answer that no other try can change, or the budget is used up.
func (c *Client) try(ctx context.Context, f func(context.Context, *endpoint) error) error {
	asked := ctx
	ctx, cancel := context.WithTimeout(ctx, c.retry.budget)
	defer cancel()
	pause := c.retry.first
	for {
		again, err := c.round(ctx, f)
		if asked.Err() != nil {
			return asked.Err() // the caller gave up, and not the budget
		}
		if err == nil || !again {
			return err
		}
		// Full jitter keeps a thousand nodes that boot together apart.
		d := pause/2 + rand.N(pause/2+1)
		pause = min(2*pause, c.retry.max)
		c.log.Warn("the key service did not answer, trying again", "error", err, "in", d.Round(time.Millisecond))
		if c.progress != nil {
			c.progress("waiting for the key service: "+err.Error(), d)
		}
		if waitErr := c.wait(ctx, d); waitErr != nil {
			if asked.Err() != nil {
				return asked.Err()
			}
			f := failure.Of(err)
			return failure.New(f.Class, fmt.Errorf("gave up after %s: %w", c.retry.budget, err), f.Hint)
		}
	}
}

// round asks each endpoint once, the one that answered last first. again says
// that another round may give another result: one endpoint that cannot be had
// now is enough, whatever the others are.
func (c *Client) round(ctx context.Context, f func(context.Context, *endpoint) error) (again bool, _ error) {
	c.mu.Lock()
	start := c.preferred
	c.mu.Unlock()
	var errs []error
	for i := range c.endpoints {
		n := (start + i) % len(c.endpoints)
		e := c.endpoints[n]
		if c.progress != nil {
			c.progress("asking the key service "+e.address, atls.DefaultTimeout+callTimeout)
		}
		err := f(ctx, e)
		if err == nil {
			c.mu.Lock()
			c.preferred = n
			c.mu.Unlock()
			return false, nil
		}
		err = withContext(err, fmt.Sprintf("key service %s", e.address))
		if isAnswer(err) {
			return false, err
		}
		again = again || worthAnotherTry(err)
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return again, worst(errs)
}

func withContext(err error, what string) error {
	f := failure.Of(err)
	return &failure.Error{Class: f.Class, CorrelationID: f.CorrelationID, Hint: f.Hint, Err: fmt.Errorf("%s: %w", what, err)}
}

// worst keeps the error that a person most needs to see: a server that is not
// trusted before one that is not there.
func worst(errs []error) error {
	for _, err := range errs {
		if failure.Of(err).Class != failure.Unreachable {
			return err
		}
	}
	return errs[0]
}

// isAnswer reports that a trusted key service decided: another endpoint of it
// would say the same.
func isAnswer(err error) bool {
	switch failure.Of(err).Class {
	case failure.Unreachable, failure.ServerUntrusted, failure.Internal:
		return false
	}
	return true
}

func worthAnotherTry(err error) bool {
	// A clock that is not set yet makes a good certificate look expired.
	return failure.Of(err).Class == failure.Unreachable || errors.Is(err, atls.ErrCertificateTime)
}

// classify gives errors of a handshake their class.
func classify(err error) error {
	var refusal *atls.Refusal
	var classed *failure.Error
	switch {
	case err == nil || errors.As(err, &classed):
		return err
	case errors.As(err, &refusal):
		class := failure.EvidenceRefused
		if refusal.Class != atls.RefusedEvidence && refusal.Class != atls.RefusedExchange {
			class = failure.Unreachable // the verifier's own fault, or a vendor's outage: try again
		}
		return &failure.Error{Class: class, CorrelationID: refusal.CorrelationID, Err: err,
			Hint: "the key service's log has the details under this correlation id"}
	case errors.Is(err, atls.ErrCertificateTime):
		return failure.New(failure.ServerUntrusted, fmt.Errorf("%w; this machine's clock says %s", err, time.Now().UTC().Format(time.RFC3339)), "check the clock, then the server's certificate")
	case errors.Is(err, attestation.ErrUnendorsed):
		return failure.New(failure.Unreachable, err, "what its vendor says of the server's hardware cannot be had now; see endorsements in the configuration")
	case errors.Is(err, atls.ErrServerUntrusted), errors.Is(err, attestation.ErrRefused), errors.Is(err, atls.ErrPeerUnattested):
		return failure.New(failure.ServerUntrusted, err, "is this the right server? see servers in the configuration")
	case errors.Is(err, attestation.ErrNoDevice), errors.Is(err, attestation.ErrLocal):
		return failure.New(failure.NoDevice, err, "keyagent evidence shows what this machine can prove")
	case errors.Is(err, atls.ErrConfiguration), errors.Is(err, atls.ErrNoEvidence):
		return failure.New(failure.Configuration, err, "")
	case errors.Is(err, context.Canceled):
		return err
	default:
		return failure.New(failure.Unreachable, err, "")
	}
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
