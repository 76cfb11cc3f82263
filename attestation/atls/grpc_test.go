package atls

import (
	"context"
	"net"
	"testing"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

func TestCredentialsCarryTheChannelToBothEnds(t *testing.T) {
	w := newWorld(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	type side struct {
		conn net.Conn
		info credentials.AuthInfo
		err  error
	}
	result := make(chan side, 1)
	go func() {
		raw, err := l.Accept()
		if err != nil {
			result <- side{err: err}
			return
		}
		c, info, err := NewServerCredentials(w.server).Clone().ServerHandshake(raw)
		result <- side{c, info, err}
	}()
	creds := NewClientCredentials(w.client)
	// The authority that gRPC dials is not what authenticates the server.
	c, info, err := creds.Clone().ClientHandshake(t.Context(), "other.example", dial(t, l.Addr().String()))
	s := <-result
	if err != nil || s.err != nil {
		t.Fatalf("client: %v, server: %v", err, s.err)
	}
	defer c.Close()
	defer s.conn.Close()
	ch, ok := FromContext(peer.NewContext(context.Background(), &peer.Peer{AuthInfo: s.info}))
	if !ok || ch.PeerExpires().IsZero() {
		t.Fatal("the handler sees no channel")
	}
	if mine, ok := FromPeer(&peer.Peer{AuthInfo: info}); !ok || mine.Verdict().CorrelationID == "" {
		t.Error("the caller sees no channel")
	}
}

func TestAConnectionThatIsNotAttestedHasNoChannel(t *testing.T) {
	if _, ok := FromContext(t.Context()); ok {
		t.Error("a context without a peer")
	}
	if _, ok := FromPeer(&peer.Peer{}); ok {
		t.Error("a peer without credentials")
	}
	if _, ok := FromPeer(&peer.Peer{AuthInfo: credentials.TLSInfo{}}); ok {
		t.Error("a peer with plain TLS")
	}
}

func TestCredentialsAreForOneSide(t *testing.T) {
	w := newWorld(t)
	client, server := NewClientCredentials(w.client), NewServerCredentials(w.server)
	if _, _, err := client.ServerHandshake(nil); err == nil {
		t.Error("client's credentials serve")
	}
	if _, _, err := server.ClientHandshake(t.Context(), "", nil); err == nil {
		t.Error("server's credentials dial")
	}
	for _, c := range []interface{ OverrideServerName(string) error }{client, server} {
		if c.OverrideServerName("x") == nil {
			t.Error("the server's name is overridden")
		}
	}
}
