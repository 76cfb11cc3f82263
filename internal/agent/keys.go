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
	"google.golang.org/grpc/peer"

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

// endpoint keeps one connection, which gRPC makes, and makes again, on demand:
// each time with a fresh attestation.
type endpoint struct {
	address string
	conn    *grpc.ClientConn
	service keyservicev1.KeyServiceClient

	mu  sync.Mutex
	why error // of the last failed dial or handshake
}

// ClientOptions configure [NewClient].
type ClientOptions struct {
	Config   *Config
	Issuers  []attestation.Issuer
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
		e, err := c.newEndpoint(s.Address, &atls.ClientConfig{
			ServerName: s.Name, RootCAs: s.roots, PinnedSPKI: s.pins,
			Identity: id, Issuers: opts.Issuers, Server: opts.Server, Timeout: opts.Timeout,
		})
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
		c.endpoints = append(c.endpoints, e)
	}
	return c, nil
}

func (c *Client) newEndpoint(address string, cfg *atls.ClientConfig) (*endpoint, error) {
	e := &endpoint{address: address}
	timeout := cfg.Timeout
	if timeout == 0 {
		timeout = atls.DefaultTimeout
	}
	var err error
	e.conn, err = grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(atls.NewClientCredentials(cfg).OnHandshake(func(err error, took time.Duration) {
			if err != nil {
				e.failed(err)
				return
			}
			logStep(c.log, "attested", took)
		})),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", addr)
			if err != nil {
				e.failed(failure.New(failure.Unreachable, err, "is the key service running, and does this network reach it?"))
			}
			return conn, err
		}),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: timeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(atls.MaxFrame)),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, err
	}
	e.service = keyservicev1.NewKeyServiceClient(e.conn)
	return e, nil
}

func (e *endpoint) failed(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.why = err
}

// cause replaces gRPC's text about a failed connection with the error itself.
func (e *endpoint) cause(err error) error {
	if err == nil {
		return nil
	}
	e.mu.Lock()
	why := e.why
	e.why = nil
	e.mu.Unlock()
	if f := failure.Of(failure.FromStatus(err)); f.Class != failure.Unreachable || why == nil {
		return failure.FromStatus(err)
	}
	return why
}

// Close closes the connections.
func (c *Client) Close() error {
	var err error
	for _, e := range c.endpoints {
		err = errors.Join(err, e.conn.Close())
	}
	return err
}

// GetKey implements KeySource.
func (c *Client) GetKey(ctx context.Context, volume string, format bool) (*Key, error) {
	op := keyservicev1.Operation_OPERATION_OPEN
	if format {
		op = keyservicev1.Operation_OPERATION_FORMAT
	}
	var key *Key
	err := c.try(ctx, func(ctx context.Context, e *endpoint) error {
		var p peer.Peer
		resp, err := e.service.GetKey(ctx, &keyservicev1.GetKeyRequest{VolumeId: volume, Operation: op}, grpc.Peer(&p))
		if err != nil {
			return e.cause(err)
		}
		ch, ok := atls.FromPeer(&p)
		if !ok {
			return failure.Newf(failure.ServerUntrusted, "", "the connection is not attested")
		}
		key, err = openKey(ch, volume, op, resp)
		return err
	})
	return key, err
}

func openKey(ch *atls.Channel, volume string, op keyservicev1.Operation, resp *keyservicev1.GetKeyResponse) (*Key, error) {
	k := &Key{
		Pending:    resp.GetState() == keyservicev1.VolumeState_VOLUME_STATE_PENDING,
		Identity:   luks.Identity{Volume: volume, UUID: resp.GetLuksUuid(), Generation: resp.GetGeneration()},
		KeyVersion: resp.GetKeyVersion(), CorrelationID: resp.GetCorrelationId(),
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
	return c.try(ctx, func(ctx context.Context, e *endpoint) error {
		_, err := e.service.ConfirmVolume(ctx, &keyservicev1.ConfirmVolumeRequest{
			VolumeId: k.Identity.Volume, Generation: k.Identity.Generation, KeyVersion: k.KeyVersion, HeaderMac: mac[:],
		})
		return e.cause(err)
	})
}

// try calls f with one endpoint after the other until one succeeds, one gives
// an answer that no other try can change, or the budget is used up.
func (c *Client) try(ctx context.Context, f func(context.Context, *endpoint) error) error {
	ctx, cancel := context.WithTimeout(ctx, c.retry.budget)
	defer cancel()
	pause := c.retry.first
	for {
		err := c.round(ctx, f)
		if err == nil || !worthAnotherTry(err) {
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
			f := failure.Of(err)
			return failure.New(f.Class, fmt.Errorf("gave up after %s: %w", c.retry.budget, err), f.Hint)
		}
	}
}

// round asks each endpoint once, the one that answered last first.
func (c *Client) round(ctx context.Context, f func(context.Context, *endpoint) error) error {
	c.mu.Lock()
	start := c.preferred
	c.mu.Unlock()
	var errs []error
	for i := range c.endpoints {
		n := (start + i) % len(c.endpoints)
		e := c.endpoints[n]
		err := classify(f(ctx, e))
		if err == nil {
			c.mu.Lock()
			c.preferred = n
			c.mu.Unlock()
			return nil
		}
		err = withContext(err, fmt.Sprintf("key service %s", e.address))
		if isAnswer(err) || ctx.Err() != nil {
			return err
		}
		errs = append(errs, err)
	}
	return worst(errs)
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
		if refusal.Class != string(failure.EvidenceRefused) && refusal.Class != "malformed exchange" {
			class = failure.Unreachable // the verifier's own fault: try again
		}
		return &failure.Error{Class: class, CorrelationID: refusal.CorrelationID, Err: err,
			Hint: "the key service's log has the details under this correlation id"}
	case errors.Is(err, atls.ErrCertificateTime):
		return failure.New(failure.ServerUntrusted, fmt.Errorf("%w; this machine's clock says %s", err, time.Now().UTC().Format(time.RFC3339)), "check the clock, then the server's certificate")
	case errors.Is(err, atls.ErrServerUntrusted), errors.Is(err, attestation.ErrRefused), errors.Is(err, atls.ErrPeerUnattested):
		return failure.New(failure.ServerUntrusted, err, "is this the right server? see servers in the configuration")
	case errors.Is(err, attestation.ErrNoDevice):
		return failure.New(failure.NoDevice, err, "keyagent evidence shows what this machine can prove")
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
