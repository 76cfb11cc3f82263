package atls

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// The tests of this file run on a clock that stands still while somebody works.

// inMemory connects both ends without a network, since a network's time is real.
func (w *world) inMemory(t testing.TB) (client, server *Conn) {
	t.Helper()
	a, b := net.Pipe()
	result := make(chan end, 1)
	go func() {
		c, err := Server(context.Background(), b, w.server)
		result <- end{c, err}
	}()
	c, err := Client(context.Background(), a, w.client)
	s := <-result
	if err != nil || s.err != nil {
		t.Fatalf("client: %v, server: %v", err, s.err)
	}
	return c, s.conn
}

// silent lets a peer get as far as f and then waits for the server to lose
// patience.
func silent(t *testing.T, f func(*tls.Conn)) (time.Duration, error) {
	t.Helper()
	w := newWorld(t)
	w.server.Timeout = time.Minute
	a, b := net.Pipe()
	cfg := baseTLS(time.Now)
	cfg.ServerName, cfg.RootCAs = "127.0.0.1", w.pki.Pool()
	cfg.Certificates = []tls.Certificate{newIdentity(t).certificate}
	var peer sync.WaitGroup
	defer peer.Wait()
	defer a.Close()
	if f != nil {
		peer.Go(func() { f(tls.Client(a, cfg)) })
	}
	started := time.Now()
	_, err := Server(context.Background(), b, w.server)
	return time.Since(started), err
}

// Case 34: a peer that is silent, or trickles, is let go when its time is up.
func TestAPeerThatIsTooSlowIsLetGo(t *testing.T) {
	open := framed(make([]byte, maxOpen))
	for name, f := range map[string]func(*tls.Conn){
		"silent from the start":     nil,
		"silent after TLS":          func(c *tls.Conn) { _ = c.Handshake() },
		"silent within the length":  func(c *tls.Conn) { _, _ = c.Write([]byte{0, 0}) },
		"silent within a frame":     func(c *tls.Conn) { _, _ = c.Write(framed([]byte{1, 2, 3})[:6]) },
		"silent after its Open":     func(c *tls.Conn) { _ = byteFrames{rw: c}.Send(openFrame(1, true)); _, _ = io.Copy(io.Discard, c) },
		"one byte a second":         func(c *tls.Conn) { trickle(c, open) },
		"reads nothing, as Servers": func(c *tls.Conn) { _ = byteFrames{rw: c}.Send(openFrame(1, true)) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				took, err := silent(t, f)
				if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("ended by %v", err)
				}
				if took < time.Minute || took > time.Minute+10*time.Second { // TLS takes 5 s for its good-bye
					t.Errorf("took %s", took)
				}
			})
		})
	}
}

func trickle(c *tls.Conn, data []byte) {
	for i := range data {
		if _, err := c.Write(data[i : i+1]); err != nil {
			return
		}
		time.Sleep(time.Second)
	}
}

func TestAClientDoesNotWaitForASilentServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.client.Timeout = time.Minute
		a, b := net.Pipe()
		defer b.Close()
		_, err := Client(t.Context(), a, w.client)
		wantErr(t, err, ErrHandshake)
		wantErr(t, err, context.DeadlineExceeded)
	})
}

func TestACancelledExchangeEndsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b := net.Pipe()
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 1)
		go func() {
			_, err := Server(ctx, b, w.server)
			result <- err
		}()
		cfg := baseTLS(time.Now)
		cfg.ServerName, cfg.RootCAs = "127.0.0.1", w.pki.Pool()
		cfg.Certificates = []tls.Certificate{newIdentity(t).certificate}
		c := tls.Client(a, cfg)
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the server waits for the first frame
		started := time.Now()
		cancel()
		go io.Copy(io.Discard, c)
		wantErr(t, <-result, context.Canceled)
		if took := time.Since(started); took > 0 {
			t.Errorf("took %s", took)
		}
		c.Close()
	})
}

// A verdict ends, and the connection with it, on both sides of a mutual one.
func TestAVerdictEndsAndTheConnectionWithIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.server.Clients.Appraiser = appraiser{10 * time.Minute}
		c, s := w.inMemory(t)
		defer c.Close()
		defer s.Close()
		started := time.Now()
		if at := c.Channel().Verdict().Expires; !at.Equal(started.Add(10*time.Minute)) || !at.Equal(s.Channel().PeerExpires()) {
			t.Errorf("the verdict ends at %s, here %s", at, s.Channel().PeerExpires())
		}
		go func() { // nine minutes of honest talk
			for range 9 {
				_, _ = c.Write([]byte("x"))
				time.Sleep(time.Minute)
			}
			_, _ = io.Copy(io.Discard, c)
		}()
		buf := make([]byte, 1)
		for range 9 {
			if _, err := s.Read(buf); err != nil {
				t.Fatal(err)
			}
		}
		_, err := s.Read(buf) // waits, and the verdict ends meanwhile
		wantErr(t, err, ErrExpired)
		if took := time.Since(started); took < 10*time.Minute || took > 10*time.Minute+6*time.Second {
			t.Errorf("after %s", took)
		}
		_, err = s.Write(buf)
		wantErr(t, err, ErrExpired)
		_, _, err = s.Channel().Peer()
		wantErr(t, err, ErrExpired)
		_, err = s.Channel().Seal(nil, mustSecret(t, "a key"))
		wantErr(t, err, ErrExpired)
	})
}

func TestARenewalKeepsTheConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, s := newWorld(t).inMemory(t)
		defer c.Close()
		defer s.Close()
		first := c.Channel().Verdict()
		time.Sleep(50 * time.Minute)
		client, server := reattest(t, c, s)
		if client != nil || server != nil {
			t.Fatalf("client: %v, server: %v", client, server)
		}
		if now := c.Channel().Verdict(); now.CorrelationID == first.CorrelationID || now.Expires.Sub(first.Expires) != 50*time.Minute {
			t.Errorf("verdict %+v after %+v", now, first)
		}
		time.Sleep(50 * time.Minute) // the first verdict would have ended
		go func() { _, _ = c.Write([]byte("x")) }()
		if _, err := s.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
	})
}

func reattest(t testing.TB, c, s *Conn) (client, server error) {
	t.Helper()
	done := make(chan error)
	go func() { done <- s.Reattest(t.Context()) }()
	client = c.Reattest(t.Context())
	return client, <-done
}

// Case 28: a machine that was reset, or is another one, has no part in the
// channel any more.
func TestARenewalByAnotherMachineIsRefused(t *testing.T) {
	for name, change := range map[string]func(*machine){
		"reset":               func(m *machine) { m.epoch = "2" },
		"another machine":     func(m *machine) { m.identity = "twin" },
		"refused by a policy": func(m *machine) { m.identity = "stranger" },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				c, s := w.inMemory(t)
				defer c.Close()
				defer s.Close()
				change(w.node)
				client, server := reattest(t, c, s)
				wantErr(t, server, ErrEpoch)
				var r *Refusal
				if !errors.As(client, &r) {
					t.Errorf("client: %v", client)
				}
				_, _, err := s.Channel().Peer()
				wantErr(t, err, ErrExpired)
				if _, err := s.Write([]byte("x")); err == nil {
					t.Error("the connection goes on")
				}
			})
		})
	}
}

// What was accepted before does not outlive a renewal that was refused, also
// where the stream below is not the connection itself.
func TestARefusedRenewalEndsTheVerdict(t *testing.T) {
	m := node()
	c := newCouple(m)
	c.mustRun(t)
	c.fromClient = change(evidenceOf, func(e *attestv1.Evidence) { e.Items[0].Data = []byte("{}") })
	client, server := c.run()
	wantErr(t, server, errForged)
	if client == nil {
		t.Error("the client does not hear of it")
	}
	_, _, err := c.server.Peer()
	wantErr(t, err, ErrExpired)
	c.fromClient = nil
	c.mustRun(t) // and it may come back
	if _, _, err := c.server.Peer(); err != nil {
		t.Error(err)
	}
}

// Case 35: a vendor's outage during a renewal says nothing of the machine. What was
// accepted before holds until its own end, and a first exchange is refused.
func TestAnOutageOfAVendorEndsNoVerdict(t *testing.T) {
	c := newCouple(node())
	unendorsed := change(evidenceOf, func(e *attestv1.Evidence) { e.Items[0].Data = []byte("unendorsed") })
	c.fromClient = unendorsed
	client, server := c.run()
	wantErr(t, server, attestation.ErrUnendorsed)
	var r *Refusal
	if !errors.As(client, &r) || r.Class != "endorsements missing" {
		t.Errorf("client: %v", client)
	}
	if _, _, err := c.server.Peer(); !errors.Is(err, ErrPeerUnattested) {
		t.Error(err)
	}
	c.fromClient = nil
	c.mustRun(t)
	before := c.server.PeerExpires()
	c.fromClient = unendorsed
	_, server = c.run()
	wantErr(t, server, attestation.ErrRefused)
	if _, _, err := c.server.Peer(); err != nil || c.server.PeerExpires() != before {
		t.Errorf("%v, until %s, before %s", err, c.server.PeerExpires(), before)
	}
}

func TestAVerdictWithoutALifetimeIsRefused(t *testing.T) {
	for _, d := range []time.Duration{0, -time.Hour, time.Millisecond} {
		c := newCouple(node())
		c.server.peers.Appraiser = appraiser{d}
		c.wantRefusal(t, ErrConfiguration)
	}
}
