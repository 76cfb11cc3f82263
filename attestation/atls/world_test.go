package atls

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/lab/pki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// wantErr is the one assertion about errors: which one, and not merely that
// there is one.
func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

// The fake hardware of these tests: what it signs cannot be made elsewhere,
// since only machines and verifiers hold the key.
var hardwareKey = []byte("known to the fake hardware's maker")

var (
	errForged   = fmt.Errorf("%w: fake signature", attestation.ErrRefused)
	errStale    = fmt.Errorf("%w: answer to another question", attestation.ErrRefused)
	errUnbound  = fmt.Errorf("%w: evidence for another connection", attestation.ErrRefused)
	errStranger = fmt.Errorf("%w: stranger", attestation.ErrRefused)
)

type fakeEvidence struct {
	Identity, Epoch     string
	Ask, Binder, Signed []byte
}

func (e *fakeEvidence) signature() []byte {
	f := fields(nil).add([]byte(e.Identity)).add([]byte(e.Epoch)).add(e.Ask).add(e.Binder)
	m := hmac.New(sha256.New, hardwareKey)
	m.Write(f)
	return m.Sum(nil)
}

// machine is hardware with its issuer.
type machine struct {
	kind            attestation.Kind
	identity, epoch string
	open            int // attempts that were not closed
	begun, signed   int
}

func (m *machine) Kind() attestation.Kind { return m.kind }

func (m *machine) Begin(context.Context) (attestation.Attempt, error) {
	m.open++
	m.begun++
	return &fakeAttempt{m}, nil
}

type fakeAttempt struct{ m *machine }

func (a *fakeAttempt) Offer() []byte { return []byte(a.m.identity) }
func (a *fakeAttempt) Close() error  { a.m.open--; return nil }

func (a *fakeAttempt) Evidence(_ context.Context, ask []byte, b attestation.Binder) ([]byte, error) {
	a.m.signed++
	e := fakeEvidence{Identity: a.m.identity, Epoch: a.m.epoch, Ask: ask, Binder: b[:]}
	e.Signed = e.signature()
	return json.Marshal(e)
}

// fakeVerifier believes the fake hardware.
type fakeVerifier struct{ kind attestation.Kind }

func (v fakeVerifier) Kind() attestation.Kind { return v.kind }

func (v fakeVerifier) Begin(context.Context, []byte) (attestation.Question, error) {
	return &fakeQuestion{v.kind, []byte(rand.Text())}, nil
}

type fakeQuestion struct {
	kind attestation.Kind
	ask  []byte
}

func (q *fakeQuestion) Ask() []byte { return q.ask }

func (q *fakeQuestion) Verify(_ context.Context, data []byte, b attestation.Binder) ([]attestation.Claims, error) {
	var e fakeEvidence
	if string(data) == "unendorsed" {
		return nil, attestation.ErrUnendorsed
	}
	if json.Unmarshal(data, &e) != nil || !hmac.Equal(e.Signed, e.signature()) {
		return nil, errForged
	}
	if string(e.Ask) != string(q.ask) {
		return nil, errStale
	}
	if string(e.Binder) != string(b[:]) {
		return nil, errUnbound
	}
	return []attestation.Claims{{Kind: q.kind, Identity: e.Identity, Epoch: e.Epoch}}, nil
}

// appraiser accepts everybody but "stranger".
type appraiser struct{ lifetime time.Duration }

func (a appraiser) Appraise(_ context.Context, v *attestation.Verified) (time.Duration, error) {
	for _, c := range v.All() {
		if c.Identity == "stranger" {
			return 0, errStranger
		}
	}
	return a.lifetime, nil
}

func demand(kinds ...attestation.Kind) *Peers {
	p := &Peers{Appraiser: appraiser{time.Hour}}
	for _, k := range kinds {
		p.Verifiers = append(p.Verifiers, fakeVerifier{k})
	}
	return p
}

// world is both ends' configuration, of which a test changes one thing.
type world struct {
	pki    *pki.Authority
	cert   tls.Certificate
	node   *machine
	client *ClientConfig
	server *ServerConfig
}

const testTimeout = 20 * time.Second

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{pki: pki.New(t), node: &machine{kind: "fake", identity: "node", epoch: "1"}}
	var err error
	if w.cert, err = w.pki.Server("127.0.0.1"); err != nil {
		t.Fatal(err)
	}
	w.client = &ClientConfig{
		ServerName: "127.0.0.1", RootCAs: w.pki.Pool(), Identity: newIdentity(t),
		Issuers: []attestation.Issuer{w.node}, Timeout: testTimeout,
	}
	w.server = &ServerConfig{
		Certificate: func() (*tls.Certificate, error) { return &w.cert, nil },
		Clients:     demand("fake"), Timeout: testTimeout,
	}
	return w
}

// mutual lets the server attest itself as well.
func (w *world) mutual() *world {
	w.server.Issuers = []attestation.Issuer{&machine{kind: "fake", identity: "service", epoch: "1"}}
	w.client.Server = demand("fake")
	return w
}

func newIdentity(t testing.TB) *Identity {
	t.Helper()
	id, err := NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// end is what one side got.
type end struct {
	conn *Conn
	err  error
}

// serve runs the server's side for one connection.
func (w *world) serve(t testing.TB) (address string, result <-chan end) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	out := make(chan end, 1)
	go func() {
		defer l.Close()
		raw, err := l.Accept()
		if err != nil {
			out <- end{nil, err}
			return
		}
		c, err := Server(context.Background(), raw, w.server)
		out <- end{c, err}
	}()
	t.Cleanup(func() { l.Close() })
	return l.Addr().String(), out
}

func dial(t testing.TB, address string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// meet connects both ends.
func (w *world) meet(t testing.TB) (client, server end) {
	t.Helper()
	address, result := w.serve(t)
	client.conn, client.err = Client(context.Background(), dial(t, address), w.client)
	server = <-result
	for _, e := range []end{client, server} {
		if e.conn != nil {
			t.Cleanup(func() { e.conn.Close() })
		}
	}
	return client, server
}

func (w *world) mustMeet(t testing.TB) (client, server *Conn) {
	t.Helper()
	c, s := w.meet(t)
	if c.err != nil || s.err != nil {
		t.Fatalf("client: %v, server: %v", c.err, s.err)
	}
	return c.conn, s.conn
}

// rawTLS is a TLS client that speaks for itself after the handshake.
func (w *world) rawTLS(t testing.TB, change func(*tls.Config)) (*tls.Conn, <-chan end) {
	t.Helper()
	address, result := w.serve(t)
	cfg := baseTLS(time.Now)
	cfg.ServerName, cfg.RootCAs = "127.0.0.1", w.pki.Pool()
	cfg.Certificates = []tls.Certificate{newIdentity(t).certificate}
	if change != nil {
		change(cfg)
	}
	return tls.Client(dial(t, address), cfg), result
}
