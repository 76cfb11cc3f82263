package atls

import (
	"context"
	"errors"
	"fmt"
	"net"

	"google.golang.org/grpc"
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
func NewClientCredentials(cfg *ClientConfig) credentials.TransportCredentials {
	return &clientCredentials{cfg: cfg}
}

// NewServerCredentials returns gRPC credentials for the side that listens.
func NewServerCredentials(cfg *ServerConfig) credentials.TransportCredentials {
	return &serverCredentials{cfg: cfg}
}

var errWrongSide = errors.New("credentials are for the other side")

var protocolInfo = credentials.ProtocolInfo{SecurityProtocol: "attested-tls"}

func authInfo(c *Conn) AuthInfo {
	return AuthInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		Channel:        c.channel,
	}
}

type clientCredentials struct{ cfg *ClientConfig }

func (c *clientCredentials) ClientHandshake(ctx context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, err := Client(ctx, raw, c.cfg)
	if err != nil {
		return nil, nil, err
	}
	return conn, authInfo(conn), nil
}

func (*clientCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errWrongSide
}

func (*clientCredentials) Info() credentials.ProtocolInfo { return protocolInfo }

func (c *clientCredentials) Clone() credentials.TransportCredentials { d := *c; return &d }

func (*clientCredentials) OverrideServerName(string) error {
	return errors.New("the server's name cannot be overridden")
}

// NewGRPC speaks gRPC over a connection that [Client] has already attested: for callers that
// want its errors as they are, and one attempt at a time. It uses this connection and no other:
// when that ends, every call fails. The connection is its to close, also when it fails.
func NewGRPC(conn *Conn, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	handover := make(chan net.Conn, 1)
	handover <- conn
	client, err := grpc.NewClient("passthrough:///"+conn.RemoteAddr().String(), append([]grpc.DialOption{
		grpc.WithTransportCredentials(established{}),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-handover:
				return c, nil
			default:
				return nil, errors.New("the attested connection ended")
			}
		}),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	}, opts...)...)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return client, nil
}

type established struct{}

func (established) ClientHandshake(_ context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, ok := raw.(*Conn)
	if !ok {
		return nil, nil, fmt.Errorf("%w: %T is not an attested connection", ErrConnectionState, raw)
	}
	return conn, authInfo(conn), nil
}

func (established) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errWrongSide
}

func (established) Info() credentials.ProtocolInfo { return protocolInfo }

func (e established) Clone() credentials.TransportCredentials { return e }

func (established) OverrideServerName(string) error {
	return errors.New("the server's name cannot be overridden")
}

type serverCredentials struct{ cfg *ServerConfig }

func (s *serverCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	// gRPC lifts the deadline once the first HTTP/2 frame has come.
	conn, err := serve(context.Background(), raw, s.cfg)
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
