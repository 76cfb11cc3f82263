// Package faultproxy stands between a client and an HTTP service of a test, and
// breaks what passes: answers that are lost, services that fall silent, refuse or
// lie. gRPC over plain HTTP/2 passes as well.
package faultproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync"
	"testing"
)

// Proxy passes requests to a service. What it breaks can be changed at any time.
type Proxy struct {
	URL   string         // http://127.0.0.1:PORT, or https
	Roots *x509.CertPool // who vouches for the proxy, if it speaks TLS
	PEM   []byte         // the same as a file

	mu     sync.Mutex
	answer func(http.ResponseWriter, *http.Request) bool
	lose   func(*http.Request) bool
	stall  chan struct{}
	count  int
}

// New starts a proxy in front of the service at target, for example
// "http://127.0.0.1:9000". It ends with the test.
func New(t testing.TB, target string) *Proxy {
	t.Helper()
	return Handle(t, forward(t, target))
}

// NewTLS is New for clients that demand TLS.
func NewTLS(t testing.TB, target string) *Proxy {
	t.Helper()
	return HandleTLS(t, forward(t, target))
}

func forward(t testing.TB, target string) http.Handler {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(u)
			r.Out.Host = r.In.Host // signatures cover it
		},
		Transport: byVersion{transport(false), transport(true)},
		// No FlushInterval: streams are flushed at once anyway, and a flush between
		// the headers and the end of an answer without a body, as that of a gRPC
		// error, makes two frames of what must be one.
		ErrorLog: log.New(io.Discard, "", 0), // clients that go away are what it is for
	}
}

// byVersion speaks HTTP/2 without TLS to whom HTTP/2 came from.
type byVersion struct{ one, two *http.Transport }

func transport(h2 bool) *http.Transport {
	p := &http.Protocols{}
	p.SetHTTP1(!h2)
	p.SetUnencryptedHTTP2(h2)
	// The services are of this test and on loopback.
	return &http.Transport{Protocols: p, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
}

func (v byVersion) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.ProtoMajor == 2 {
		return v.two.RoundTrip(r)
	}
	return v.one.RoundTrip(r)
}

// Handle starts a proxy in front of a handler of this process.
func Handle(t testing.TB, service http.Handler) *Proxy {
	t.Helper()
	p, server := newProxy(t, service)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	p.URL = server.URL
	return p
}

// HandleTLS is Handle for clients that demand TLS.
func HandleTLS(t testing.TB, service http.Handler) *Proxy {
	t.Helper()
	p, server := newProxy(t, service)
	server.StartTLS()
	p.URL, p.Roots = server.URL, x509.NewCertPool()
	p.Roots.AddCert(server.Certificate())
	p.PEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	return p
}

func newProxy(t testing.TB, service http.Handler) (*Proxy, *httptest.Server) {
	p := &Proxy{}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { p.serve(w, r, service) }))
	server.Config.Protocols = &http.Protocols{}
	server.Config.Protocols.SetHTTP1(true)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(func() {
		p.Heal()
		server.CloseClientConnections()
		server.Close()
	})
	return p, server
}

func (p *Proxy) serve(w http.ResponseWriter, r *http.Request, service http.Handler) {
	p.mu.Lock()
	p.count++
	answer, stall := p.answer, p.stall
	lose := p.lose != nil && p.lose(r)
	if lose {
		p.lose = nil
	}
	p.mu.Unlock()
	switch {
	case stall != nil:
		select {
		case <-stall:
		case <-r.Context().Done():
		}
		panic(http.ErrAbortHandler)
	case answer != nil && answer(w, r):
	case lose:
		// It is carried out whatever the client does.
		service.ServeHTTP(httptest.NewRecorder(), r.WithContext(context.WithoutCancel(r.Context())))
		panic(http.ErrAbortHandler)
	default:
		service.ServeHTTP(w, r)
	}
}

// LoseAnswer lets the next request that matches reach the service, and breaks the
// connection instead of passing the answer on.
func (p *Proxy) LoseAnswer(match func(*http.Request) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lose = match
}

// Stall makes every request hang until its client gives up or release is called,
// which breaks the connections.
func (p *Proxy) Stall() (release func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stall = make(chan struct{})
	return p.Heal
}

// Answer has f see each request; it passes to the service if f returns false.
func (p *Proxy) Answer(f func(http.ResponseWriter, *http.Request) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer = f
}

// Heal ends whatever is broken.
func (p *Proxy) Heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stall != nil {
		close(p.stall)
	}
	p.stall, p.answer, p.lose = nil, nil, nil
}

// Requests counts what has come so far.
func (p *Proxy) Requests() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count
}
