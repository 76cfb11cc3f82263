package amd

import (
	"encoding/hex"
	"encoding/pem"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/snp"
)

// KDS is AMD's key distribution service, with the chips that were added to it. It
// is a handler for a server, and it is a source without one.
type KDS struct {
	// Fault, if it is set and returns true, has answered in the service's stead.
	Fault func(http.ResponseWriter, *http.Request) bool

	mu       sync.Mutex
	products map[string]*Authority
	chips    map[string]*Chip
	crls     map[string][]byte
	asked    map[string]int
}

// NewKDS returns a service that knows these chips and their authorities.
func NewKDS(chips ...*Chip) *KDS {
	k := &KDS{products: map[string]*Authority{}, chips: map[string]*Chip{}, crls: map[string][]byte{}, asked: map[string]int{}}
	for _, c := range chips {
		k.products[c.Product] = c.Authority
		id := c.ID[:]
		if c.Product == "Turin" {
			id = id[:8]
		}
		k.chips[hex.EncodeToString(id)] = c
	}
	return k
}

// SetCRL replaces the revocation list of a product line.
func (k *KDS) SetCRL(product string, der []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.crls[product] = der
}

// Asked is how often each path was asked for.
func (k *KDS) Asked() map[string]int {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := map[string]int{}
	for path, n := range k.asked {
		out[path] = n
	}
	return out
}

// ServeHTTP implements http.Handler.
func (k *KDS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	k.mu.Lock()
	k.asked[r.URL.Path]++
	k.mu.Unlock()
	if k.Fault != nil && k.Fault(w, r) {
		return
	}
	body := k.answer(r)
	if body == nil {
		http.NotFound(w, r)
		return
	}
	_, _ = w.Write(body)
}

func (k *KDS) answer(r *http.Request) []byte {
	parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/"), "/") // vcek, v1, product, what
	if len(parts) != 4 || parts[1] != "v1" {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	a := k.products[parts[2]]
	switch {
	case a == nil:
		return nil
	case parts[3] == "cert_chain":
		middle := a.ASK
		if parts[0] == "vlek" {
			middle = a.ASVK
		}
		return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: middle.Raw}),
			pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.ARK.Raw})...)
	case parts[3] == "crl":
		if der := k.crls[a.Product]; der != nil {
			return der
		}
		der, err := a.FreshCRL()
		if err != nil {
			return nil
		}
		return der
	case parts[0] == "vcek":
		c := k.chips[parts[3]]
		if c == nil || c.Product != parts[2] || r.URL.Query().Get("blSPL") == "" || (c.Product == "Turin") != r.URL.Query().Has("fmcSPL") {
			return nil
		}
		return c.VCEK.Raw
	}
	return nil
}

// Source asks a server of this service at url as if it were AMD's.
func Source(url string) (*endorsement.HTTP, error) {
	return endorsement.NewHTTP(endorsement.HTTPOptions{
		Hosts: []string{snp.KDS}, Mirrors: map[string]string{snp.KDS: url}, Timeout: 5 * time.Second,
	})
}
