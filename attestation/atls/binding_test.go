package atls

import (
	"context"
	"crypto/hpke"
	"crypto/tls"
	"errors"
	"io"
	"testing"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/lab/pki"
)

func TestAnHonestClientIsAttested(t *testing.T) {
	w := newWorld(t)
	var seen []Outcome
	w.server.Observe = func(o Outcome) { seen = append(seen, o) }
	c, s := w.mustMeet(t)
	v, id, err := s.Channel().Peer()
	if err != nil || v.Identity() != "fake:node" || id != c.Channel().Verdict().CorrelationID {
		t.Fatalf("peer %v as %s, %v", v, id, err)
	}
	if len(seen) != 1 || seen[0].Err != nil || seen[0].CorrelationID != id || seen[0].Peer != v {
		t.Errorf("observed %+v", seen)
	}
	if _, _, err := c.Channel().Peer(); !errors.Is(err, ErrPeerUnattested) {
		t.Errorf("the client believes that the server attested itself: %v", err)
	}
	go func() { _, _ = c.Write([]byte("hello")) }()
	got := make([]byte, 5)
	if _, err := io.ReadFull(s, got); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	if w.node.open != 0 {
		t.Errorf("%d attempts are still open", w.node.open)
	}
}

func TestBothSidesAttestEachOther(t *testing.T) {
	c, s := newWorld(t).mutual().mustMeet(t)
	for name, ch := range map[string]*Channel{"fake:service": c.Channel(), "fake:node": s.Channel()} {
		if v, _, err := ch.Peer(); err != nil || v.Identity() != name {
			t.Errorf("%v, %v, want %s", v, err, name)
		}
	}
}

// relay passes on what two TLS sessions of the attacker carry, in the clear.
func relay(a, b *tls.Conn) {
	done := make(chan struct{})
	go func() { _, _ = io.Copy(a, b); a.Close(); close(done) }()
	_, _ = io.Copy(b, a)
	b.Close()
	<-done
}

// Case 18. The attacker has a genuine machine elsewhere that attests itself to
// the attacker, and relays that to the service, which the attacker talks to over
// a TLS session of its own.
func TestEvidenceThatIsRelayedIntoAnotherSessionIsRefused(t *testing.T) {
	w := newWorld(t)
	victim := newWorld(t) // trusts the attacker's authority
	toService, service := w.rawTLS(t, nil)
	address, toVictim := listenTLS(t, victim.cert)
	node := make(chan error, 1)
	go func() {
		_, err := Client(t.Context(), dial(t, address), victim.client)
		node <- err
	}()
	relay(<-toVictim, toService)
	wantErr(t, (<-service).err, errUnbound)
	var refusal *Refusal
	if err := <-node; !errors.As(err, &refusal) {
		t.Errorf("the genuine machine learns %v", err)
	}
	// The same machine is welcome without the man in the middle.
	w.client.Issuers = victim.client.Issuers
	w.mustMeet(t)
}

// listenTLS is an attacker's server.
func listenTLS(t testing.TB, cert tls.Certificate) (string, <-chan *tls.Conn) {
	t.Helper()
	cfg := baseTLS(nil)
	cfg.Certificates, cfg.ClientAuth = []tls.Certificate{cert}, tls.RequireAnyClientCert
	l, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	out := make(chan *tls.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			out <- c.(*tls.Conn)
		}
	}()
	return l.Addr().String(), out
}

// Case 19.
func TestEvidenceThatIsReplayedIsRefused(t *testing.T) {
	c := newCouple(node())
	var old []*attestv1.Item
	c.fromClient = change(evidenceOf, func(e *attestv1.Evidence) { old = e.Items })
	c.mustRun(t)

	c = newCouple(node()) // the same session keys: only the challenge is another one
	c.fromClient = change(evidenceOf, func(e *attestv1.Evidence) { e.Items = old })
	c.wantRefusal(t, errStale)
}

// A verifier whose questions are always the same still has the nonce.
func TestTheNonceAloneMakesEvidenceFresh(t *testing.T) {
	c, again := newCouple(node()), newCouple(node())
	for _, x := range []*couple{c, again} {
		x.server.peers = &Peers{Verifiers: []attestation.Verifier{fixedVerifier{}}, Appraiser: appraiser{testTimeout}}
	}
	var old []*attestv1.Item
	c.fromClient = change(evidenceOf, func(e *attestv1.Evidence) { old = e.Items })
	c.mustRun(t)
	again.fromClient = change(evidenceOf, func(e *attestv1.Evidence) { e.Items = old })
	again.wantRefusal(t, errUnbound)
}

type fixedVerifier struct{}

func (fixedVerifier) Kind() attestation.Kind { return "fake" }

func (fixedVerifier) Begin(context.Context, []byte) (attestation.Question, error) {
	return &fakeQuestion{"fake", []byte("always the same")}, nil
}

// Case 19. The client has no hardware and shows the server what the server
// showed, in the very same session.
func TestEvidenceThatIsReflectedIsRefused(t *testing.T) {
	c := newCouple(node())
	service := &machine{kind: "fake", identity: "service", epoch: "1"}
	c.server.issuers, c.client.peers = []attestation.Issuer{service}, demand("fake")
	for _, x := range []*Channel{c.client, c.server} {
		x.peers.Verifiers = []attestation.Verifier{fixedVerifier{}}
	}
	c.mustRun(t)

	// The attacker owns the client, down to its challenge: everything that the
	// binder covers but the role can be made equal.
	var hello *attestv1.Hello
	var nonce []byte
	var shown []*attestv1.Item
	attacker := func(f *attestv1.Frame) (*attestv1.Frame, error) {
		if e := f.GetEvidence(); e != nil {
			shown = e.GetItems()
		}
		if h := f.GetHello(); h != nil {
			hello = h
		}
		if ch := f.GetChallenge(); ch != nil {
			nonce = ch.GetNonce()
		}
		return f, nil
	}
	c.fromServer = attacker
	c.fromClient = change(evidenceOf, func(e *attestv1.Evidence) { e.Items = shown })
	c.wantRefusal(t, errUnbound)

	in := binderInput{role: serverRole, exporter: make([]byte, 32), clientSPKI: c.client.clientSPKI,
		serverSPKI: c.client.serverSPKI, nonce: nonce, hpkeKey: hello.GetHpkePublicKey()}
	other := in
	other.role = clientRole
	if in.binder() == other.binder() {
		t.Error("both roles have one binder")
	}
}

// Case 19, and every other input of the binder: who changes one gets another
// binder.
func TestEachInputOfTheBinderIsCovered(t *testing.T) {
	for name, tamper := range map[string]func(*couple){
		"another exporter":     func(c *couple) { c.server.exporter = exporterOf("another session") },
		"another client's key": func(c *couple) { c.server.clientSPKI = []byte("attacker's key") },
		"another server's key": func(c *couple) { c.server.serverSPKI = []byte("attacker's key") },
		"an HPKE key that was swapped in flight": func(c *couple) {
			key, err := hpke.MLKEM768X25519().GenerateKey()
			if err != nil {
				panic(err)
			}
			c.fromClient = change(helloOf, func(h *attestv1.Hello) { h.HpkePublicKey = key.PublicKey().Bytes() })
		},
		"an offer that was changed": func(c *couple) {
			c.fromClient = change(helloOf, func(h *attestv1.Hello) { h.Offers[0].Data = []byte("more") })
		},
		"an offer of another kind beside it": func(c *couple) {
			c.fromClient = change(helloOf, func(h *attestv1.Hello) { h.Offers = append(h.Offers, &attestv1.Item{Kind: "other"}) })
		},
		"a nonce that was changed": func(c *couple) {
			c.fromServer = change(challengeOf, func(ch *attestv1.Challenge) { ch.Nonce[0] ^= 1 })
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCouple(node())
			tamper(c)
			c.wantRefusal(t, errUnbound)
		})
	}
	newCouple(node()).mustRun(t)
}

func TestAFailingExporterIsNamed(t *testing.T) {
	broken := errors.New("no exporter")
	for name, exporter := range map[string]func(string, []byte, int) ([]byte, error){
		"error": func(string, []byte, int) ([]byte, error) { return nil, broken },
		"short": func(string, []byte, int) ([]byte, error) { return make([]byte, 31), nil },
		"empty": func(string, []byte, int) ([]byte, error) { return nil, nil },
	} {
		t.Run(name, func(t *testing.T) {
			c := newCouple(node())
			c.client.exporter = exporter
			client, _ := c.run()
			wantErr(t, client, ErrExporter)
			c = newCouple(node())
			c.server.exporter = exporter
			_, server := c.run()
			wantErr(t, server, ErrExporter)
			if name == "error" {
				wantErr(t, server, broken)
			}
		})
	}
}

// The keys that a server pins are of the certificate that it sent, also while
// another one comes into force.
func TestACertificateThatChangesDuringTheHandshake(t *testing.T) {
	w := newWorld(t)
	next, err := w.pki.Server("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	first := w.cert
	w.client.PinnedSPKI = [][32]byte{pki.SPKI(first)}
	calls := 0
	w.server.Certificate = func() (*tls.Certificate, error) {
		if calls++; calls == 1 {
			return &first, nil
		}
		return &next, nil
	}
	w.mustMeet(t)
}
