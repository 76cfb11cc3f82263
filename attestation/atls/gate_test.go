package atls

import (
	"errors"
	"io"
	"net"
	"testing"
)

// source is a listener of connections that a test makes.
type source struct{ conns chan net.Conn }

func (s source) Accept() (net.Conn, error) {
	c, ok := <-s.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (s source) Close() error { return nil }
func (source) Addr() net.Addr { return &net.TCPAddr{} }

// guest is both ends of a connection behind a gate.
type guest struct {
	gated *gatedConn
	far   net.Conn
}

func arrive(t testing.TB, g *Gate, s source) guest {
	t.Helper()
	far, near := net.Pipe()
	s.conns <- near
	c, err := g.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close(); c.Close() })
	return guest{c.(*gatedConn), far}
}

// gone reports whether the gate closed the connection.
func (g guest) gone() bool {
	done := make(chan error, 1)
	go func() { _, err := g.far.Write([]byte{1}); done <- err }()
	_, err := g.gated.Read(make([]byte, 1))
	return errors.Is(err, io.ErrClosedPipe) && <-done != nil || err != nil
}

func newGate(limit int) (*Gate, source) {
	s := source{make(chan net.Conn, 1)}
	return NewGate(s, limit), s
}

// Case 32.
func TestAFloodPushesOutItself(t *testing.T) {
	g, s := newGate(4)
	attested, encrypted := arrive(t, g, s), arrive(t, g, s)
	attested.gated.Encrypted()
	attested.gated.Attested()
	encrypted.gated.Encrypted()
	var idle []guest
	for range 1000 {
		idle = append(idle, arrive(t, g, s))
	}
	for i, x := range idle {
		if want := i < len(idle)-3; x.gone() != want {
			t.Fatalf("idle connection %d of %d: gone %v", i, len(idle), !want)
		}
	}
	if attested.gone() || encrypted.gone() {
		t.Error("the flood pushed out somebody who had got further")
	}
	if now, evicted := g.Waiting(); now != 4 || evicted != 997 {
		t.Errorf("%d wait, %d were pushed out", now, evicted)
	}
}

// Who has TLS but no verdict yields only to others who got as far, and never
// one who is attested.
func TestAttestedConnectionsAreNeverClosed(t *testing.T) {
	g, s := newGate(2)
	var attested, encrypted []guest
	for range 8 {
		x := arrive(t, g, s)
		x.gated.Encrypted()
		x.gated.Attested()
		attested = append(attested, x)
	}
	for range 8 {
		x := arrive(t, g, s)
		x.gated.Encrypted()
		encrypted = append(encrypted, x)
	}
	for i, x := range attested {
		if x.gone() {
			t.Errorf("attested connection %d is gone", i)
		}
	}
	for i, x := range encrypted {
		if want := i < 6; x.gone() != want {
			t.Errorf("encrypted connection %d: gone %v", i, !want)
		}
	}
}

func TestAGateForgetsWhatWasClosed(t *testing.T) {
	g, s := newGate(2)
	for range 100 {
		x := arrive(t, g, s)
		x.gated.Close()
		x.gated.Close()
		x.gated.Encrypted() // late words of a connection that is gone
		x.gated.Attested()
	}
	if now, evicted := g.Waiting(); now != 0 || evicted != 0 {
		t.Errorf("%d wait, %d were pushed out", now, evicted)
	}
	if g.waiting[0].first != nil || g.waiting[1].last != nil {
		t.Error("the queues are not empty")
	}
}

// Case 32: silent connections do not hold up a server that stops; attested ones
// finish what they do.
func TestAGateThatClosesLetsTheUnattestedGo(t *testing.T) {
	g, s := newGate(8)
	attested, encrypted, idle := arrive(t, g, s), arrive(t, g, s), arrive(t, g, s)
	attested.gated.Attested()
	encrypted.gated.Encrypted()
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if attested.gone() || !encrypted.gone() || !idle.gone() {
		t.Errorf("gone: attested %v, encrypted %v, idle %v", attested.gone(), encrypted.gone(), idle.gone())
	}
	far, late := net.Pipe()
	defer far.Close()
	s.conns <- late
	_, err := g.Accept()
	wantErr(t, err, net.ErrClosed)
	if _, err := late.Read(make([]byte, 1)); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("one that came late is still open: %v", err)
	}
}
