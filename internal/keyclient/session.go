package keyclient

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/wire"
)

const (
	// dialTimeout bounds how long an address may take to answer at all.
	dialTimeout = 10 * time.Second
	// callTimeout bounds one request in a session.
	callTimeout = 30 * time.Second
	// renewBefore the end of a verdict, the session is attested again.
	renewBefore = 30 * time.Second
)

// Server is one endpoint of the key service. It is authenticated by Roots or by
// Pins, of which one must be set.
type Server struct {
	Address string // HOST:PORT
	Name    string // in the certificate
	Roots   *x509.CertPool
	Pins    [][32]byte // SHA-256 of the public key
}

// endpoint is how a session with one server begins.
type endpoint struct {
	address string
	cfg     *atls.ClientConfig
	issuers func(context.Context) ([]attestation.Issuer, error)
	floor   *floor
	log     *slog.Logger
}

// session is one attested connection. It is never repaired: whatever goes wrong
// with it ends it, and the next call attests anew.
type session struct {
	address string
	raw     *watched
	channel *atls.Channel
	conn    *grpc.ClientConn
	service keyservicev1.KeyServiceClient
}

// watched is a connection that knows whether it has ended: gRPC closes it when the other
// side is gone.
type watched struct {
	net.Conn
	closed atomic.Bool
}

func (w *watched) Close() error {
	w.closed.Store(true)
	return w.Conn.Close()
}

func (e *endpoint) connect(ctx context.Context) (*session, error) {
	tcp, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", e.address)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, failure.New(failure.Unreachable, err, "is the key service running, and does this network reach it?")
	}
	raw := &watched{Conn: tcp}
	started := time.Now()
	cfg := *e.cfg
	if cfg.Issuers, err = e.issuers(ctx); err != nil {
		return nil, errors.Join(classify(err), raw.Close())
	}
	conn, err := atls.Client(ctx, raw, &cfg)
	if err != nil {
		return nil, classify(err)
	}
	if cfg.RootCAs != nil {
		// An authority of the operator's signed it, and said from when on.
		e.floor.saw(conn.ConnectionState().PeerCertificates[0].NotBefore)
	}
	e.log.Info("step", "step", "attested", "took_ms", float64(time.Since(started).Microseconds())/1000)
	client, err := atls.NewGRPC(conn,
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(atls.MaxFrame), grpc.ForceCodecV2(wire.Codec())),
		// A peer that went away without a word is noticed; an idle session stays.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: time.Minute, Timeout: 10 * time.Second}),
		grpc.WithIdleTimeout(0),
	)
	if err != nil {
		return nil, err
	}
	// Its end is noticed also while nothing is asked on it.
	client.Connect()
	return &session{e.address, raw, conn.Channel(), client, keyservicev1.NewKeyServiceClient(client)}, nil
}

// fresh reports that it stands, and that the verdict on this machine holds for that much
// longer.
func (s *session) fresh(left time.Duration) bool {
	return !s.raw.closed.Load() && time.Until(s.channel.Verdict().Expires) > max(left, renewBefore)
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

func (s *session) close() { _ = s.conn.Close() }
