package intel

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/keyagent/keyagent/attestation/endorsement"
)

// PCS is the provisioning certification service, version 4, and the place of the
// root's revocation list beside it. Its zero value of a fault is none.
type PCS struct {
	World *World
	// Fault, if set, may answer a request itself, and says whether it did.
	Fault func(w http.ResponseWriter, r *http.Request) bool

	mu       sync.Mutex
	requests []string
	// Replace holds documents that are served instead of the world's, by the
	// key of Answer.
	replace map[string]endorsement.Document
}

// Keys of what is served, for Replace.
const (
	TCBInfo    = "tcb"
	QEIdentity = "qe"
	PCKCRL     = "pckcrl"
	RootCRL    = "rootcrl"
)

// Replace serves another document from now on.
func (p *PCS) Replace(key string, d endorsement.Document) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.replace == nil {
		p.replace = map[string]endorsement.Document{}
	}
	p.replace[key] = d
}

// Requests are the addresses that were asked for.
func (p *PCS) Requests() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.requests...)
}

// answer finds the document of an address, and the header for its chain.
func (p *PCS) answer(u *url.URL) (endorsement.Document, string, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.requests = append(p.requests, u.String())
	query := u.Query()
	var d endorsement.Document
	var key, header string
	switch u.Path {
	case "/tdx/certification/v4/tcb":
		key, header, d = TCBInfo, "TCB-Info-Issuer-Chain", p.World.TCBInfo(query.Get("fmspc"), nil)
	case "/tdx/certification/v4/qe/identity":
		key, header, d = QEIdentity, "SGX-Enclave-Identity-Issuer-Chain", p.World.QEIdentity(nil)
	case "/sgx/certification/v4/pckcrl":
		key, header, d = PCKCRL, "SGX-PCK-CRL-Issuer-Chain", p.World.PCKCRL(query.Get("ca"))
	case "/IntelSGXRootCA.der":
		key, d = RootCRL, endorsement.Document{Body: p.World.CRL(p.World.Root)}
	default:
		return d, "", false
	}
	if other, ok := p.replace[key]; ok {
		d = other
	}
	return d, header, true
}

// ServeHTTP answers as Intel's service does: the chain escaped in a header.
func (p *PCS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if p.Fault != nil && p.Fault(w, r) {
		return
	}
	d, header, ok := p.answer(r.URL)
	if !ok {
		http.NotFound(w, r)
		return
	}
	if header != "" {
		w.Header().Set(header, Escape(d.Chain))
	}
	w.Write(d.Body)
}

// Get implements endorsement.Source without HTTP.
func (p *PCS) Get(ctx context.Context, r endorsement.Request) (endorsement.Document, error) {
	if err := ctx.Err(); err != nil {
		return endorsement.Document{}, fmt.Errorf("%w: %w", endorsement.ErrUnavailable, err)
	}
	u, err := url.Parse(r.URL)
	if err != nil {
		return endorsement.Document{}, err
	}
	d, _, ok := p.answer(u)
	if !ok {
		return endorsement.Document{}, fmt.Errorf("%w: %s", endorsement.ErrNotFound, r.URL)
	}
	return endorsement.Document{Body: bytes.Clone(d.Body), Chain: bytes.Clone(d.Chain)}, nil
}

// Escape makes PEM fit for a header, as Intel's service does: a space is %20, and
// a plus sign %2B.
func Escape(chain []byte) string {
	return strings.ReplaceAll(url.QueryEscape(string(chain)), "+", "%20")
}
