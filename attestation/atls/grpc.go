package atls

import (
	"context"
	"errors"
	"net"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// AuthInfo is what gRPC hands to both ends of an attested channel.
type AuthInfo struct {
	credentials.CommonAuthInfo
	Channel *Channel
}

// AuthType implements credentials.AuthInfo.
func (AuthInfo) AuthType() string { return "attested-tls" }

// FromContext returns the attested channel of the RPC whose handler ctx is, or
// of a client's call that used grpc.Peer.
func FromContext(ctx context.Context) (*Channel, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	return FromPeer(p)
}

// FromPeer returns the attested channel of a peer.
func FromPeer(p *peer.Peer) (*Channel, bool) {
	info, ok := p.AuthInfo.(AuthInfo)
	return info.Channel, ok
}

// NewClientCredentials returns gRPC credentials for the side that dials.
func NewClientCredentials(cfg *ClientConfig) *ClientCredentials {
	return &ClientCredentials{cfg: cfg}
}

// NewServerCredentials returns gRPC credentials for the side that listens.
func NewServerCredentials(cfg *ServerConfig) credentials.TransportCredentials {
	return &serverCredentials{cfg: cfg}
}

var errWrongSide = errors.New("credentials are for the other side")

var protocolInfo = credentials.ProtocolInfo{SecurityProtocol: "attested-tls", SecurityVersion: "1"}

func authInfo(c *Conn) AuthInfo {
	return AuthInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		Channel:        c.channel,
	}
}

// ClientCredentials implement credentials.TransportCredentials.
type ClientCredentials struct {
	cfg    *ClientConfig
	report func(err error, took time.Duration)
}

// OnHandshake calls f after each handshake with its error, which gRPC hands to
// callers as text only, or nil. f must be safe for concurrent use.
func (c *ClientCredentials) OnHandshake(f func(err error, took time.Duration)) *ClientCredentials {
	return &ClientCredentials{cfg: c.cfg, report: f}
}

// ClientHandshake implements credentials.TransportCredentials.
func (c *ClientCredentials) ClientHandshake(ctx context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	started := time.Now()
	conn, err := Client(ctx, raw, c.cfg)
	if c.report != nil {
		c.report(err, time.Since(started))
	}
	if err != nil {
		return nil, nil, err
	}
	return conn, authInfo(conn), nil
}

// ServerHandshake implements credentials.TransportCredentials.
func (*ClientCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errWrongSide
}

// Info implements credentials.TransportCredentials.
func (*ClientCredentials) Info() credentials.ProtocolInfo { return protocolInfo }

// Clone implements credentials.TransportCredentials.
func (c *ClientCredentials) Clone() credentials.TransportCredentials { d := *c; return &d }

// OverrideServerName implements credentials.TransportCredentials. The server's
// name comes from the configuration alone.
func (*ClientCredentials) OverrideServerName(string) error {
	return errors.New("the server's name cannot be overridden")
}

type serverCredentials struct{ cfg *ServerConfig }

func (s *serverCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, err := Server(context.Background(), raw, s.cfg)
	if err != nil {
		return nil, nil, err
	}
	return conn, authInfo(conn), nil
}

func (*serverCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errWrongSide
}

func (*serverCredentials) Info() credentials.ProtocolInfo { return protocolInfo }

func (s *serverCredentials) Clone() credentials.TransportCredentials { d := *s; return &d }

func (*serverCredentials) OverrideServerName(string) error {
	return errors.New("a server has no name to override")
}
