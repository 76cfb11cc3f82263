package atls

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

// Conn is an attested TLS connection. It reads and writes application bytes
// until the verdict on the peer ends; after that it gives [ErrExpired] and is
// closed. The two sides renew the verdict by calling Reattest at a message
// boundary.
type Conn struct {
	*tls.Conn
	channel *Channel

	hold func(n int) // see Gate

	mu     sync.Mutex
	expiry *time.Timer // closes the connection when the verdict on the peer ends
	closed bool
}

// Channel returns the connection's attestation state.
func (c *Conn) Channel() *Channel { return c.channel }

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	if err := c.alive(); err != nil {
		return 0, err
	}
	n, err := c.Conn.Read(p)
	return n, c.expiredOr(err)
}

// Write implements net.Conn.
func (c *Conn) Write(p []byte) (int, error) {
	if err := c.alive(); err != nil {
		return 0, err
	}
	n, err := c.Conn.Write(p)
	return n, c.expiredOr(err)
}

// alive closes the connection of a peer whose verdict has ended. A peer that is
// not asked for evidence has no verdict to end.
func (c *Conn) alive() error {
	if c.channel.peers == nil {
		return nil
	}
	// Not a refused renewal: that verdict must still reach the peer.
	if err := c.channel.expired(c.channel.PeerExpires()); err != nil {
		_ = c.Conn.Close()
		return err
	}
	return nil
}

// expiredOr says why a read or write ended, if the end of the verdict is why.
func (c *Conn) expiredOr(err error) error {
	if err != nil {
		if e := c.alive(); e != nil {
			return e
		}
	}
	return err
}

// arm lets the connection end with the verdict on the peer. A timer does it and
// not a deadline of the connection, because gRPC sets those itself.
func (c *Conn) arm() {
	if c.channel.peers == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	if c.expiry != nil {
		c.expiry.Stop()
	}
	c.expiry = time.AfterFunc(c.channel.PeerExpires().Sub(c.channel.now()), func() { _ = c.alive() })
}

// Close implements net.Conn.
func (c *Conn) Close() error {
	c.mu.Lock()
	c.closed = true
	if c.expiry != nil {
		c.expiry.Stop()
	}
	c.mu.Unlock()
	return c.Conn.Close()
}

// Reattest renews the verdicts of this connection. Both sides call it when no
// application byte is under way. An error closes the connection: the two sides
// no longer agree on where the next message begins.
func (c *Conn) Reattest(ctx context.Context) error {
	err := c.exchange(ctx, c.channel.bound())
	if err == nil {
		err = c.Conn.SetDeadline(time.Time{})
	}
	if err != nil {
		_ = c.Close()
	}
	return err
}

func (c *Conn) exchange(ctx context.Context, timeout time.Duration) error {
	stop := context.AfterFunc(ctx, func() { _ = c.Conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_ = c.Conn.SetDeadline(time.Now().Add(timeout))
	if err := c.channel.run(ctx, byteFrames{c.Conn, c.hold}); err != nil {
		if ctx.Err() != nil {
			err = errors.Join(ctx.Err(), err)
		}
		return err
	}
	return nil
}

// Client authenticates the server of conn, attests this side to it, and
// demands the server's evidence if the configuration says so. On an error conn
// is closed.
func Client(ctx context.Context, conn net.Conn, cfg *ClientConfig) (*Conn, error) {
	tlsConfig, err := clientTLS(cfg)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	ch := &Channel{self: clientRole, issuers: cfg.Issuers, peers: cfg.Server, now: clock(cfg.Now)}
	local := func() []byte { return cfg.Identity.certificate.Certificate[0] }
	return lifted(handshake(ctx, conn, tls.Client(conn, tlsConfig), local, ch, cfg.Timeout))
}

// Server demands and appraises the evidence of the client behind conn. On an
// error conn is closed.
func Server(ctx context.Context, conn net.Conn, cfg *ServerConfig) (*Conn, error) {
	return lifted(serve(ctx, conn, cfg))
}

// lifted lets a connection without its deadline go on as long as its verdict does.
func lifted(c *Conn, err error) (*Conn, error) {
	if err != nil {
		return nil, err
	}
	if err := c.Conn.SetDeadline(time.Time{}); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// serve is Server. The deadline stays: the peer has attested itself, and may still
// never say a word. The reader of the first one lifts it.
func serve(ctx context.Context, conn net.Conn, cfg *ServerConfig) (*Conn, error) {
	tlsConfig, local, err := serverTLS(cfg)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	ch := &Channel{self: serverRole, issuers: cfg.Issuers, peers: cfg.Clients, observe: cfg.Observe, now: clock(cfg.Now)}
	return handshake(ctx, conn, tls.Server(conn, tlsConfig), local, ch, cfg.Timeout)
}

func clock(now func() time.Time) func() time.Time {
	if now == nil {
		return time.Now
	}
	return now
}

// handshake runs TLS and the exchange. local gives the certificate that this
// side sent, once the TLS handshake is done.
func handshake(ctx context.Context, raw net.Conn, conn *tls.Conn, local func() []byte, ch *Channel, timeout time.Duration) (_ *Conn, err error) {
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	guarded, _ := raw.(guarded)
	if guarded == nil {
		guarded = unguarded{}
	}
	ch.limit = timeout
	c := &Conn{Conn: conn, channel: ch, hold: guarded.Hold}
	ch.judged = c.arm
	defer func() {
		if err != nil {
			_ = conn.Close()
			_ = raw.Close()
		}
	}()
	ch.remote = raw.RemoteAddr().String()
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, handshakeError(err)
	}
	guarded.Encrypted()
	if err := ch.bind(conn.ConnectionState(), local()); err != nil {
		return nil, err
	}
	if err := c.exchange(ctx, timeout); err != nil {
		return nil, err
	}
	identity := ""
	if p := ch.peer.verified; p != nil {
		identity = p.Identity()
	} else if host, _, err := net.SplitHostPort(ch.remote); err == nil {
		identity = "from " + host // of a peer that need not prove anything
	}
	if err := guarded.Attested(identity); err != nil {
		return nil, err
	}
	return c, nil
}

// bind takes from the TLS connection what evidence is bound to.
func (c *Channel) bind(s tls.ConnectionState, local []byte) error {
	switch {
	case s.Version != tls.VersionTLS13:
		return fmt.Errorf("%w: %s", ErrConnectionState, tls.VersionName(s.Version))
	case s.DidResume:
		return fmt.Errorf("%w: resumed session", ErrConnectionState)
	case s.CurveID != tls.X25519MLKEM768:
		return fmt.Errorf("%w: key exchange %s", ErrConnectionState, s.CurveID)
	case len(s.PeerCertificates) == 0:
		return fmt.Errorf("%w: peer has no certificate", ErrConnectionState)
	}
	own, peer := &c.clientSPKI, &c.serverSPKI
	if c.self == serverRole {
		own, peer = peer, own
	}
	*peer = s.PeerCertificates[0].RawSubjectPublicKeyInfo
	leaf, err := x509.ParseCertificate(local)
	if err != nil {
		return fmt.Errorf("%w: this side's certificate: %w", ErrConnectionState, err)
	}
	*own = leaf.RawSubjectPublicKeyInfo
	if c.exporter == nil {
		c.exporter = s.ExportKeyingMaterial
	}
	return nil
}

func baseTLS(now func() time.Time) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		CurvePreferences:       []tls.CurveID{tls.X25519MLKEM768},
		SessionTicketsDisabled: true,
		Time:                   now,
	}
}

func clientTLS(cfg *ClientConfig) (*tls.Config, error) {
	switch {
	case cfg.RootCAs == nil && len(cfg.PinnedSPKI) == 0:
		return nil, fmt.Errorf("%w: neither a certificate authority nor a pinned key of the server is set", ErrConfiguration)
	case cfg.RootCAs != nil && cfg.ServerName == "":
		return nil, fmt.Errorf("%w: the server's name is not set", ErrConfiguration)
	case cfg.Identity == nil:
		return nil, fmt.Errorf("%w: no identity", ErrConfiguration)
	}
	if err := oneOfEachKind(cfg.Issuers); err != nil {
		return nil, err
	}
	if cfg.Server != nil {
		if err := cfg.Server.check(); err != nil {
			return nil, err
		}
	}
	now := cfg.CertificateTime
	if now == nil {
		now = clock(cfg.Now)
	}
	c := baseTLS(now)
	c.ServerName = cfg.ServerName
	c.RootCAs = cfg.RootCAs
	c.Certificates = []tls.Certificate{cfg.Identity.certificate}
	if cfg.RootCAs == nil {
		// The pin below authenticates the server; no authority does.
		c.InsecureSkipVerify = true
	}
	if len(cfg.PinnedSPKI) > 0 {
		c.VerifyConnection = func(s tls.ConnectionState) error {
			if got := sha256.Sum256(s.PeerCertificates[0].RawSubjectPublicKeyInfo); !slices.Contains(cfg.PinnedSPKI, got) {
				return fmt.Errorf("%w: its public key is sha256:%x, which is not pinned", ErrServerUntrusted, got)
			}
			return nil
		}
	}
	return c, nil
}

// serverTLS is made for each connection, so that the certificate that was sent
// is known even while another one comes into force.
func serverTLS(cfg *ServerConfig) (_ *tls.Config, local func() []byte, _ error) {
	switch {
	case cfg.Certificate == nil || cfg.Clients == nil && !cfg.Anyone:
		return nil, nil, fmt.Errorf("%w: a server needs a certificate and demands on its clients", ErrConfiguration)
	case cfg.Anyone && cfg.Clients != nil:
		return nil, nil, fmt.Errorf("%w: a server lets anyone in, or has demands on its clients", ErrConfiguration)
	case cfg.Clients != nil:
		if err := cfg.Clients.check(); err != nil {
			return nil, nil, err
		}
	}
	if err := oneOfEachKind(cfg.Issuers); err != nil {
		return nil, nil, err
	}
	c := baseTLS(clock(cfg.Now))
	// Any key will do: the evidence says whose it is.
	c.ClientAuth = tls.RequireAnyClientCert
	var sent []byte
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		cert, err := cfg.Certificate()
		if err != nil {
			return nil, err
		}
		sent = cert.Certificate[0]
		return cert, nil
	}
	return c, func() []byte { return sent }, nil
}

func handshakeError(err error) error {
	var invalid x509.CertificateInvalidError
	var verify *tls.CertificateVerificationError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Errorf("%w: %w (hint: check this machine's clock)", ErrCertificateTime, err)
	case errors.Is(err, ErrServerUntrusted):
		return err
	case errors.As(err, &verify):
		return fmt.Errorf("%w: %w", ErrServerUntrusted, err)
	}
	return fmt.Errorf("%w: %w", ErrHandshake, err)
}

// isTransport reports that the connection itself failed, or that this side gave up
// waiting: there is nobody to send a verdict to.
func isTransport(err error) bool {
	var t *transportError
	return errors.As(err, &t) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
