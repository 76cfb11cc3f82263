package atls

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"
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

func newGate(limit int) (*Gate, source) { return newGateOf(GateLimits{Waiting: limit}) }

func newGateOf(l GateLimits) (*Gate, source) {
	s := source{make(chan net.Conn, 1)}
	return NewGate(s, l), s
}

// attest gets as far as a verdict, and a first word after it.
func (g guest) attest(t testing.TB, identity string) {
	t.Helper()
	g.gated.Encrypted()
	if err := g.gated.Attested(identity); err != nil {
		t.Fatal(err)
	}
	if err := g.gated.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
}

// Case 32.
func TestAFloodPushesOutItself(t *testing.T) {
	g, s := newGate(4)
	attested, encrypted := arrive(t, g, s), arrive(t, g, s)
	attested.attest(t, "node")
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
		x.attest(t, "node")
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
		_ = x.gated.Attested("node")
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
	attested.attest(t, "node")
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

// Case 81. A machine that attests itself and then never says a word waits like any
// other, and is the last of those that wait to go.
func TestSilenceAfterTheVerdictIsWaitingToo(t *testing.T) {
	g, s := newGate(3)
	silent, encrypted := arrive(t, g, s), arrive(t, g, s)
	silent.gated.Encrypted()
	if err := silent.gated.Attested("node"); err != nil {
		t.Fatal(err)
	}
	encrypted.gated.Encrypted()
	if now, _ := g.Waiting(); now != 2 || g.Attested() != 0 {
		t.Errorf("%d wait, %d count as attested", now, g.Attested())
	}
	first := arrive(t, g, s)
	if arrive(t, g, s); !first.gone() || silent.gone() || encrypted.gone() {
		t.Error("the one that got the least far is not the one that went")
	}
	if err := g.Close(); err != nil || !silent.gone() {
		t.Errorf("a silent peer holds up a server that stops: %v", err)
	}
}

func TestOneMachinesOldestConnectionGivesWay(t *testing.T) {
	g, s := newGateOf(GateLimits{Waiting: 8, Each: 3})
	other := arrive(t, g, s)
	other.attest(t, "other")
	var mine []guest
	for range 10 {
		x := arrive(t, g, s)
		x.attest(t, "node")
		mine = append(mine, x)
	}
	for i, x := range mine {
		if want := i < 7; x.gone() != want {
			t.Errorf("connection %d: gone %v", i, !want)
		}
	}
	if other.gone() || g.Attested() != 4 {
		t.Errorf("another machine's is gone: %v; %d are left", other.gone(), g.Attested())
	}
	for _, x := range mine[7:] {
		x.gated.Close()
	}
	if other.gated.Close(); len(g.machines) != 0 || g.Attested() != 0 {
		t.Errorf("%d machines and %d connections are remembered", len(g.machines), g.Attested())
	}
}

func TestAttestedConnectionsAreBoundedInAll(t *testing.T) {
	g, s := newGateOf(GateLimits{Waiting: 8, Attested: 2})
	arrive(t, g, s).attest(t, "a")
	first := arrive(t, g, s)
	first.attest(t, "b")
	x := arrive(t, g, s)
	if err := x.gated.Attested("c"); err != nil {
		t.Fatal(err)
	}
	wantErr(t, x.gated.SetDeadline(time.Time{}), ErrFull)
	if !x.gone() {
		t.Error("it is still open")
	}
	first.gated.Close()
	arrive(t, g, s).attest(t, "c")
}

// Case 80: what frames take while they arrive is bounded for all of them.
func TestLargeFramesPushOutEachOther(t *testing.T) {
	g, s := newGateOf(GateLimits{Waiting: 100, Memory: 3 << 20})
	small, attested := arrive(t, g, s), arrive(t, g, s)
	small.gated.Hold(freeFrame)
	attested.gated.Hold(MaxFrame)
	attested.attest(t, "node")
	attested.gated.Hold(MaxFrame) // a renewal's
	var large []guest
	for range 10 {
		x := arrive(t, g, s)
		for n := 4 << 10; n <= MaxFrame; n *= 2 {
			x.gated.Hold(n)
		}
		large = append(large, x)
	}
	for i, x := range large {
		if want := i < 7; x.gone() != want {
			t.Errorf("large frame %d: gone %v", i, !want)
		}
	}
	if small.gone() || attested.gone() {
		t.Error("another one is gone")
	}
	if g.held > 3<<20 {
		t.Errorf("%d bytes are held", g.held)
	}
	for _, x := range large {
		x.gated.Close()
	}
	if g.held != 0 {
		t.Errorf("%d bytes are never given back", g.held)
	}
}
