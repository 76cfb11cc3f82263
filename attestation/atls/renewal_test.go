package atls

import (
	"errors"
	"io"
	"testing"
	"time"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
)

// Case 83: a machine that makes its evidence while it is well, and shows it later.
func TestEvidenceThatIsHeldBackIsRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		back time.Duration
		want error
	}{
		"as long as an exchange may take": {DefaultTimeout, nil},
		"longer":                          {DefaultTimeout + time.Second, ErrLate},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCouple(node())
			clock := time.Now()
			c.server.now = func() time.Time { return clock }
			c.mustRun(t)
			before := c.server.PeerExpires()
			c.fromClient = change(evidenceOf, func(*attestv1.Evidence) { clock = clock.Add(tt.back) })
			_, err := c.run()
			if tt.want == nil {
				if err != nil || !c.server.PeerExpires().After(before) {
					t.Errorf("%v, until %s", err, c.server.PeerExpires())
				}
				return
			}
			wantErr(t, err, tt.want)
			_, _, err = c.server.Peer()
			wantErr(t, err, ErrExpired)
		})
	}
}

// Case 83: whatever a renewal is refused for, the verdict ends; a connection that
// fails is no refusal.
func TestWhateverARenewalIsRefusedForItsVerdictEnds(t *testing.T) {
	lost := errors.New("connection lost")
	for name, tt := range map[string]struct {
		tamper func(*couple)
		ends   bool
	}{
		"an HPKE key that is none": {func(c *couple) {
			c.fromClient = change(helloOf, func(h *attestv1.Hello) { h.HpkePublicKey = h.HpkePublicKey[1:] })
		}, true},
		"too few items": {func(c *couple) {
			c.fromClient = change(evidenceOf, func(e *attestv1.Evidence) { e.Items = nil })
		}, true},
		"a frame out of turn": {func(c *couple) {
			c.fromClient = func(f *attestv1.Frame) (*attestv1.Frame, error) {
				if f.GetHello() != nil {
					return openFrame(protocolVersion, true), nil
				}
				return f, nil
			}
		}, true},
		"another machine": {func(c *couple) { c.client.issuers[0].(*machine).identity = "other" }, true},
		"a lost connection": {func(c *couple) {
			c.fromClient = func(f *attestv1.Frame) (*attestv1.Frame, error) {
				if f.GetEvidence() != nil {
					return nil, lost
				}
				return f, nil
			}
		}, false},
		"no endorsements": {func(c *couple) {
			c.fromClient = change(evidenceOf, func(e *attestv1.Evidence) { e.Items[0].Data = []byte("unendorsed") })
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCouple(node())
			c.mustRun(t)
			tt.tamper(c)
			if _, server := c.run(); server == nil {
				t.Fatal("the renewal was accepted")
			}
			_, _, err := c.server.Peer()
			if tt.ends {
				wantErr(t, err, ErrExpired)
			} else if err != nil {
				t.Errorf("the verdict ended: %v", err)
			}
		})
	}
}

// A verdict that the peer never hears of stands, and so its end is what the
// connection ends with.
func TestTheTimerFollowsTheVerdictThatStands(t *testing.T) {
	c := newCouple(node())
	clock := time.Now()
	c.server.now = func() time.Time { return clock }
	var until []time.Time
	c.server.judged = func() { until = append(until, c.server.PeerExpires()) }
	c.mustRun(t)
	clock = clock.Add(time.Minute)
	c.fromServer = func(f *attestv1.Frame) (*attestv1.Frame, error) {
		if f.GetVerdict() != nil {
			return nil, errors.New("connection lost")
		}
		return f, nil
	}
	if _, server := c.run(); server == nil {
		t.Fatal("the verdict was sent")
	}
	if len(until) != 2 || !until[1].Equal(until[0].Add(time.Minute)) || !until[1].Equal(c.server.PeerExpires()) {
		t.Errorf("the timer was set to %v; the verdict ends at %s", until, c.server.PeerExpires())
	}
}

func TestARefusedPeerIsToldLittle(t *testing.T) {
	if got := peerDetail(talkative{}); len(got) != maxDetail {
		t.Errorf("%d bytes", len(got))
	}
}

type talkative struct{}

func (talkative) Error() string      { return "refused" }
func (talkative) PeerDetail() string { return string(make([]byte, 1<<20)) }

// Case 82: the service's hardware signs for nobody who has not done a TLS handshake
// with the key that is in the evidence, and asked.
func TestHardwareSignsForNobodyWhoDidNotAsk(t *testing.T) {
	open := openFrame(protocolVersion, true)
	wants := openFrame(protocolVersion, true)
	wants.GetOpen().WantsEvidence = true
	challenge := func(nonce int) *attestv1.Frame {
		return &attestv1.Frame{Body: &attestv1.Frame_Challenge{Challenge: &attestv1.Challenge{
			Nonce: make([]byte, nonce), Asks: []*attestv1.Item{{Kind: "fake"}},
		}}}
	}
	for name, tt := range map[string]struct {
		tls           bool
		frames        []*attestv1.Frame
		begun, signed int
	}{
		"no TLS":                     {false, nil, 0, 0},
		"TLS alone":                  {true, nil, 0, 0},
		"no wish for evidence":       {true, []*attestv1.Frame{open}, 0, 0},
		"a wish, and no challenge":   {true, []*attestv1.Frame{wants}, 1, 0},
		"a challenge without a wish": {true, []*attestv1.Frame{challenge(nonceSize)}, 0, 0},
		"a challenge of no use":      {true, []*attestv1.Frame{wants, challenge(nonceSize - 1)}, 1, 0},
		"a challenge":                {true, []*attestv1.Frame{wants, challenge(nonceSize)}, 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t).mutual()
			service := w.server.Issuers[0].(*machine)
			c, result := w.rawTLS(t, nil)
			if tt.tls {
				if err := c.HandshakeContext(t.Context()); err != nil {
					t.Fatal(err)
				}
				for _, f := range tt.frames {
					if err := (byteFrames{rw: c}).Send(f); err != nil {
						t.Fatal(err)
					}
				}
				go io.Copy(io.Discard, c)
				_ = c.CloseWrite()
			} else {
				_ = c.NetConn().Close()
			}
			if got := <-result; got.err == nil {
				t.Error("the stranger was accepted")
			}
			if service.begun != tt.begun || service.signed != tt.signed || service.open != 0 {
				t.Errorf("begun %d times, signed %d times, %d left open", service.begun, service.signed, service.open)
			}
			c.Close()
		})
	}
}
