package atls

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"io"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// couple is the two channels of one connection without the TLS below them: its
// exporter is a keyed digest, and what passes between them can be changed.
type couple struct {
	client, server *Channel
	// Each sees the frames of one direction and returns what goes on. An error
	// ends the connection.
	fromClient, fromServer func(*attestv1.Frame) (*attestv1.Frame, error)
}

func exporterOf(session string) func(string, []byte, int) ([]byte, error) {
	return func(label string, context []byte, n int) ([]byte, error) {
		m := hmac.New(sha256.New, []byte(session))
		m.Write(fields(nil).add([]byte(label)).add(context))
		return m.Sum(nil)[:n], nil
	}
}

// newCouple has one machine on the client's side and asks for its kind.
func newCouple(m ...*machine) *couple {
	c := &couple{
		client: &Channel{self: clientRole, exporter: exporterOf("session"), now: time.Now},
		server: &Channel{self: serverRole, exporter: exporterOf("session"), now: time.Now},
	}
	for _, ch := range []*Channel{c.client, c.server} {
		ch.clientSPKI, ch.serverSPKI = []byte("client's key"), []byte("server's key")
	}
	var kinds []attestation.Kind
	for _, m := range m {
		c.client.issuers = append(c.client.issuers, m)
		kinds = append(kinds, m.kind)
	}
	c.server.peers = demand(kinds...)
	return c
}

func node() *machine { return &machine{kind: "fake", identity: "node", epoch: "1"} }

// line is one direction of a connection.
type line struct {
	frames chan *attestv1.Frame
	gone   chan struct{} // closed when the sender has ended
}

// pipe is one side's view.
type pipe struct {
	in, out line
	change  func(*attestv1.Frame) (*attestv1.Frame, error)
}

func (p pipe) Send(f *attestv1.Frame) error {
	f = proto.Clone(f).(*attestv1.Frame) // what is changed on the way is not the sender's
	if p.change != nil {
		var err error
		if f, err = p.change(f); err != nil {
			return err
		}
	}
	select {
	case p.out.frames <- f:
		return nil
	case <-p.in.gone:
		return io.ErrClosedPipe
	}
}

func (p pipe) Recv() (*attestv1.Frame, error) {
	select {
	case f := <-p.in.frames:
		return f, nil
	default:
	}
	select {
	case f := <-p.in.frames:
		return f, nil
	case <-p.in.gone:
		select {
		case f := <-p.in.frames:
			return f, nil
		default:
			return nil, io.EOF
		}
	}
}

// run is one exchange.
func (c *couple) run() (client, server error) {
	up := line{make(chan *attestv1.Frame, 8), make(chan struct{})}
	down := line{make(chan *attestv1.Frame, 8), make(chan struct{})}
	done := make(chan error)
	go func() {
		err := c.server.run(context.Background(), pipe{up, down, c.fromServer})
		close(down.gone)
		done <- err
	}()
	client = c.client.run(context.Background(), pipe{down, up, c.fromClient})
	close(up.gone)
	return client, <-done
}

func (c *couple) mustRun(t testing.TB) {
	t.Helper()
	if client, server := c.run(); client != nil || server != nil {
		t.Fatalf("client: %v, server: %v", client, server)
	}
}

// wantRefusal demands that the server refuses by its own error and that the
// client hears of a refusal.
func (c *couple) wantRefusal(t testing.TB, want error) {
	t.Helper()
	client, server := c.run()
	wantErr(t, server, want)
	var refusal *Refusal
	if !errors.As(client, &refusal) || refusal.CorrelationID == "" || refusal.Detail != "" {
		t.Errorf("the client learns %v", client)
	}
	if v, _, err := c.server.Peer(); err == nil {
		t.Errorf("the server knows its peer as %s", v.Identity())
	}
}

func challengeOf(f *attestv1.Frame) (*attestv1.Challenge, bool) {
	return f.GetChallenge(), f.GetChallenge() != nil
}

// change runs f on the one frame of a kind.
func change[B any](of func(*attestv1.Frame) (B, bool), f func(B)) func(*attestv1.Frame) (*attestv1.Frame, error) {
	return func(frame *attestv1.Frame) (*attestv1.Frame, error) {
		if b, ok := of(frame); ok {
			f(b)
		}
		return frame, nil
	}
}

// Case 47: what is bound to a connection stays bound to it when the client attests
// itself again, and fits no other connection.
func TestAConnectionKeepsItsBinder(t *testing.T) {
	w := newWorld(t)
	w.mutual()
	client, server := w.mustMeet(t)
	first := server.Channel().Binder()
	v, _, err := server.Channel().Peer()
	if err != nil || first != v.Binder() || first != client.Channel().Binder() || first == (attestation.Binder{}) {
		t.Fatalf("server %x, client %x, %v", first, client.Channel().Binder(), err)
	}
	if c, s := reattest(t, client, server); s != nil || c != nil {
		t.Fatal(s, c)
	}
	v, _, err = server.Channel().Peer()
	if err != nil || v.Binder() == first {
		t.Errorf("a renewal has the same evidence: %v", err)
	}
	if server.Channel().Binder() != first || client.Channel().Binder() != first {
		t.Error("a renewal changed the binder of the connection")
	}
	other, _ := w.mustMeet(t)
	if other.Channel().Binder() == first {
		t.Error("two connections have one binder")
	}
}
