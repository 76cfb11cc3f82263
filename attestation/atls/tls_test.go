package atls

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/lab/pki"
)

// Case 19.
func TestOnlyTLS13WithAHybridKeyExchangeIsSpoken(t *testing.T) {
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.2": func(c *tls.Config) {
			c.MinVersion, c.MaxVersion, c.CurvePreferences = tls.VersionTLS12, tls.VersionTLS12, nil
		},
		"classical X25519":           func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} },
		"classical P-256":            func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP256} },
		"a client without a key":     func(c *tls.Config) { c.Certificates = nil },
		"hybrid, but of other parts": func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.SecP256r1MLKEM768} },
	} {
		t.Run("a client: "+name, func(t *testing.T) {
			c, result := newWorld(t).rawTLS(t, change)
			_ = c.HandshakeContext(t.Context()) // without a key, TLS 1.3 tells the client late
			_, _ = c.Read(make([]byte, 1))
			c.Close()
			wantErr(t, (<-result).err, ErrHandshake)
		})
		if name == "a client without a key" {
			continue
		}
		t.Run("a server: "+name, func(t *testing.T) {
			w := newWorld(t)
			cfg := &tls.Config{Certificates: []tls.Certificate{w.cert}}
			change(cfg)
			cfg.Certificates = []tls.Certificate{w.cert}
			_, err := Client(t.Context(), dial(t, tlsPeer(t, cfg)), w.client)
			wantErr(t, err, ErrHandshake)
		})
	}
}

// tlsPeer accepts one connection, makes the handshake and hangs up.
func tlsPeer(t testing.TB, cfg *tls.Config) string {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_ = c.(*tls.Conn).HandshakeContext(context.Background())
		c.Close()
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

// Case 19: the handshake itself cannot give such a connection; should it ever,
// this is the second lock.
func TestAnUnfitConnectionIsRefusedByName(t *testing.T) {
	w := newWorld(t)
	leaf, err := x509.ParseCertificate(w.cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	fit := tls.ConnectionState{Version: tls.VersionTLS13, CurveID: tls.X25519MLKEM768, PeerCertificates: []*x509.Certificate{leaf}}
	for name, change := range map[string]func(*tls.ConnectionState){
		"TLS 1.2":             func(s *tls.ConnectionState) { s.Version = tls.VersionTLS12 },
		"a resumed session":   func(s *tls.ConnectionState) { s.DidResume = true },
		"classical X25519":    func(s *tls.ConnectionState) { s.CurveID = tls.X25519 },
		"no key exchange":     func(s *tls.ConnectionState) { s.CurveID = 0 },
		"no peer certificate": func(s *tls.ConnectionState) { s.PeerCertificates = nil },
	} {
		t.Run(name, func(t *testing.T) {
			s := fit
			change(&s)
			wantErr(t, (&Channel{self: clientRole}).bind(s, leaf.Raw), ErrConnectionState)
		})
	}
	wantErr(t, (&Channel{self: clientRole}).bind(fit, []byte("not a certificate")), ErrConnectionState)
	if err := (&Channel{self: clientRole}).bind(fit, leaf.Raw); err != nil {
		t.Error(err)
	}
}

// ticketCache notices that a ticket came.
type ticketCache struct {
	mu      sync.Mutex
	tickets int
}

func (*ticketCache) Get(string) (*tls.ClientSessionState, bool) { return nil, false }

func (c *ticketCache) Put(_ string, s *tls.ClientSessionState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s != nil {
		c.tickets++
	}
}

// Case 19.
func TestNoSessionCanBeResumed(t *testing.T) {
	cache := &ticketCache{}
	c, result := newWorld(t).rawTLS(t, func(c *tls.Config) {
		c.SessionTicketsDisabled, c.ClientSessionCache = false, cache
	})
	// Tickets come behind the handshake: read what the server sends until it
	// hangs up, which an empty frame makes it do.
	if _, err := c.Write(make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, c)
	wantErr(t, (<-result).err, ErrFrame)
	if cache.tickets != 0 {
		t.Errorf("%d session tickets", cache.tickets)
	}
	cfg, err := clientTLS(newWorld(t).client)
	if err != nil || cfg.ClientSessionCache != nil || !cfg.SessionTicketsDisabled {
		t.Errorf("the client keeps sessions: %+v, %v", cfg, err)
	}
}

func TestAServerThatIsNotTheConfiguredOneIsRefused(t *testing.T) {
	stranger := pki.New(t)
	for name, tt := range map[string]struct {
		change func(*world)
		want   error
		text   string
	}{
		"another authority": {func(w *world) { w.client.RootCAs = stranger.Pool() }, ErrServerUntrusted, ""},
		"another name":      {func(w *world) { w.client.ServerName = "other.example" }, ErrServerUntrusted, "other.example"},
		"another pin": {func(w *world) { w.client.PinnedSPKI = [][32]byte{{1}} }, ErrServerUntrusted,
			"not pinned"},
		"another pin, no authority": {func(w *world) { w.client.PinnedSPKI, w.client.RootCAs = [][32]byte{{1}}, nil },
			ErrServerUntrusted, "not pinned"},
		"the pin holds, the authority does not": {func(w *world) {
			w.client.PinnedSPKI, w.client.RootCAs = [][32]byte{pki.SPKI(w.cert)}, stranger.Pool()
		}, ErrServerUntrusted, ""},
		"a clock ten years ahead (case 37)": {func(w *world) { w.client.Now = shifted(10) }, ErrCertificateTime,
			shifted(10)().UTC().Format("2006-01-02")},
		"a clock that was set back, on a machine that knows better (case 37)": {func(w *world) { w.client.CertificateTime = shifted(10) }, ErrCertificateTime,
			"check this machine's clock"},
		"a clock ten years behind (case 37)": {func(w *world) { w.client.Now = shifted(-10) }, ErrCertificateTime,
			shifted(-10)().UTC().Format("2006-01-02")},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			tt.change(w)
			c, s := w.meet(t)
			wantErr(t, c.err, tt.want)
			wantErr(t, c.err, ErrServerUntrusted)
			if !strings.Contains(c.err.Error(), tt.text) {
				t.Errorf("%v does not name %s", c.err, tt.text)
			}
			wantErr(t, s.err, ErrHandshake)
			if w.node.open != 0 || s.conn != nil {
				t.Error("the machine began to attest itself")
			}
		})
	}
	w := newWorld(t)
	w.client.PinnedSPKI = [][32]byte{{1}, pki.SPKI(w.cert)}
	w.mustMeet(t)
	w.client.RootCAs, w.client.ServerName = nil, ""
	w.mustMeet(t)
}

func shifted(years int) func() time.Time {
	at := time.Now().AddDate(years, 0, 0)
	return func() time.Time { return at }
}

// Case 20: what is not set is an error, and never a check that is left out.
func TestWhatIsNotSetIsAConfigurationError(t *testing.T) {
	for name, change := range map[string]func(*world){
		"no way to know the server":   func(w *world) { w.client.RootCAs = nil },
		"an authority without a name": func(w *world) { w.client.ServerName = "" },
		"no identity":                 func(w *world) { w.client.Identity = nil },
		"the server's evidence, no verifier": func(w *world) {
			w.client.Server = &Peers{Appraiser: appraiser{time.Hour}}
		},
		"the server's evidence, no appraiser": func(w *world) {
			w.client.Server = &Peers{Verifiers: demand("fake").Verifiers}
		},
		"two issuers of one kind": func(w *world) { w.client.Issuers = []attestation.Issuer{w.node, w.node} },
	} {
		t.Run("client: "+name, func(t *testing.T) {
			w := newWorld(t)
			change(w)
			c, s := w.meet(t)
			wantErr(t, c.err, ErrConfiguration)
			if s.err == nil {
				t.Error("the server accepts")
			}
		})
	}
	for name, change := range map[string]func(*world){
		"nothing demanded":  func(w *world) { w.server.Clients = nil },
		"demands, and none": func(w *world) { w.server.Anyone = true },
		"no verifier":       func(w *world) { w.server.Clients.Verifiers = nil },
		"an empty list of verifiers": func(w *world) {
			w.server.Clients.Verifiers = []attestation.Verifier{}
		},
		"two verifiers of one kind": func(w *world) { w.server.Clients = demand("fake", "fake") },
		"no appraiser":              func(w *world) { w.server.Clients.Appraiser = nil },
		"no certificate":            func(w *world) { w.server.Certificate = nil },
	} {
		t.Run("server: "+name, func(t *testing.T) {
			w := newWorld(t)
			change(w)
			c, s := w.meet(t)
			wantErr(t, s.err, ErrConfiguration)
			if c.err == nil {
				t.Error("the client goes on")
			}
		})
	}
	// A server for anyone says so, and knows nothing of who came.
	w := newWorld(t)
	w.server.Clients, w.server.Anyone = nil, true
	w.client.Issuers = nil
	c, s := w.meet(t)
	if c.err != nil || s.err != nil {
		t.Fatalf("%v, %v", c.err, s.err)
	}
	if _, _, err := s.conn.Channel().Peer(); err == nil {
		t.Error("it knows who came")
	}
	a, b := net.Pipe()
	defer b.Close()
	_, err := Client(t.Context(), a, &ClientConfig{})
	wantErr(t, err, ErrConfiguration)
	if _, err := a.Read(make([]byte, 1)); err == nil {
		t.Error("the connection is still open")
	}
}

func TestAPeerWithoutEvidenceIsRefused(t *testing.T) {
	w := newWorld(t)
	w.client.Issuers = nil
	var seen []Outcome
	w.server.Observe = func(o Outcome) { seen = append(seen, o) }
	c, s := w.meet(t)
	if len(seen) != 1 || !errors.Is(seen[0].Err, ErrPeerUnattested) || seen[0].CorrelationID == "" || seen[0].Ended {
		t.Errorf("the server observes %+v", seen)
	}
	wantErr(t, s.err, ErrPeerUnattested)
	wantErr(t, c.err, ErrNoEvidence)

	w = newWorld(t).mutual()
	w.server.Issuers = nil
	c, s = w.meet(t)
	wantErr(t, c.err, ErrPeerUnattested)
	wantErr(t, s.err, ErrNoEvidence)
}

func TestAStrangerIsToldItsClassAndNoMore(t *testing.T) {
	w := newWorld(t)
	w.node.identity = "stranger"
	c, s := w.meet(t)
	wantErr(t, s.err, errStranger)
	if c.err == nil || strings.Contains(c.err.Error(), "stranger") || !strings.Contains(c.err.Error(), "evidence refused") {
		t.Errorf("it learns %v", c.err)
	}
}

// A server certificate may hold any key that TLS takes; an expired one that is
// pinned is good, since the pin and no date says whose it is.
func TestAPinNeedsNoDates(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Unix(1, 0)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	w.cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	w.client.RootCAs, w.client.ServerName, w.client.PinnedSPKI = nil, "", [][32]byte{pki.SPKI(w.cert)}
	w.mustMeet(t)
}
