package unixsocket

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// Peer is the process at the other end of a unix socket, as the kernel knows
// it: the caller cannot forge it.
type Peer struct {
	credentials.CommonAuthInfo
	PID int32
	UID uint32
	GID uint32
	// Cgroup is the control group of the process when it connected, for those who ask
	// for it with [CallerCredentials]. Empty: it is not known, for the reason in NoCgroup.
	Cgroup   string
	NoCgroup error
}

// AuthType implements credentials.AuthInfo.
func (Peer) AuthType() string { return "peercred" }

// peerCredentials are gRPC credentials by SO_PEERCRED.
type peerCredentials struct {
	admit  func(Peer) error
	cgroup bool
}

var errNotUnix = errors.New("not a unix socket")

func (k peerCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, ok := c.(syscall.Conn)
	if _, unixAddr := c.LocalAddr().(*net.UnixAddr); !ok || !unixAddr {
		return nil, nil, errNotUnix
	}
	cred, err := credOf(u)
	if err != nil {
		return nil, nil, fmt.Errorf("peer credentials: %w", err)
	}
	p := Peer{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, PID: cred.Pid, UID: cred.Uid, GID: cred.Gid}
	if k.cgroup {
		p.Cgroup, p.NoCgroup = cgroupOf(u, cred.Pid)
	}
	if k.admit != nil {
		if err := k.admit(p); err != nil {
			return nil, nil, err
		}
	}
	return c, p, nil
}

func (peerCredentials) ClientHandshake(_ context.Context, _ string, c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if _, ok := c.(*net.UnixConn); !ok {
		return nil, nil, errNotUnix
	}
	return c, Peer{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}, nil
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}

func (p peerCredentials) Clone() credentials.TransportCredentials { return p }

func (peerCredentials) OverrideServerName(string) error { return nil }

// PeerOf returns the caller of a request.
func PeerOf(ctx context.Context) (Peer, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Peer{}, false
	}
	c, ok := p.AuthInfo.(Peer)
	return c, ok
}

// Credentials are those of both sides: the server's handlers find the caller with
// [PeerOf], and connections of callers that admit returns an error for are closed
// before a byte of them is read. A nil admit admits everybody.
func Credentials(admit func(Peer) error) credentials.TransportCredentials {
	return peerCredentials{admit: admit}
}

// CallerCredentials are [Credentials] for a service whose rules may name the control
// group of a caller.
func CallerCredentials(admit func(Peer) error) credentials.TransportCredentials {
	return peerCredentials{admit: admit, cgroup: true}
}
