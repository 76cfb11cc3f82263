package snp

import (
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/go-sev-guest/abi"
)

// vouched is a leaf that a configured root vouches for, for as long as every
// certificate and the revocation list are valid.
type vouched struct {
	*leaf
	trust    string
	product  string
	root     *x509.Certificate
	chain    []*x509.Certificate
	from, to time.Time
}

// revoked refuses a chain of which the root took a certificate back, in any list of its
// that was ever seen.
func (v *Verifier) revoked(root *x509.Certificate, chain []*x509.Certificate) error {
	for _, c := range chain {
		if since, ok := v.memory.Revoked(root, c.SerialNumber); ok {
			return fmt.Errorf("%w: %q, serial number %s, since %s", ErrRevoked, c.Subject.CommonName, c.SerialNumber, since.Format(time.RFC3339))
		}
	}
	return nil
}

// vouch finds the root that vouches for a certificate: its own, its
// intermediate, the certificate's, and a list of what AMD took back. product is
// the report's, or empty if it does not say.
func (v *Verifier) vouch(t Trust, signer abi.ReportSigner, product string, der, crl []byte) (*vouched, error) {
	now := v.now()
	keys := make([][sha256.Size]byte, len(t.Roots))
	for i, root := range t.Roots {
		if product != "" && root.Product != product {
			continue
		}
		keys[i] = cacheKey(root, signer, der, crl)
		if known := v.known.get(keys[i], now); known != nil {
			return known, v.revoked(known.root, known.chain)
		}
	}
	l, err := parseLeaf(der, signer)
	if err != nil {
		return nil, err
	}
	if product == "" {
		product = l.product
	}
	list, err := parseCRL(crl)
	if err != nil {
		return nil, err
	}
	// Of the reasons why no root vouches, the one that came furthest is told.
	reason := fmt.Errorf("%w: no root of %s", ErrUntrusted, product)
	for i, root := range t.Roots {
		if root.Product != product {
			continue
		}
		chain, err := chainTo(root, signer, l.cert, now)
		if err == nil {
			if err = signedList(list, root.ARK); err == nil {
				v.memory.Remember(root.ARK, list)
				err = cmp.Or(v.revoked(root.ARK, chain), currentList(list, now))
			}
		}
		if err != nil {
			if !errors.Is(err, ErrUntrusted) || errors.Is(reason, ErrUntrusted) {
				reason = err
			}
			continue
		}
		known := &vouched{leaf: l, trust: "root:" + root.Name, product: product, root: root.ARK, chain: chain, from: list.ThisUpdate, to: list.NextUpdate}
		for _, c := range chain {
			if c.NotBefore.After(known.from) {
				known.from = c.NotBefore
			}
			if c.NotAfter.Before(known.to) {
				known.to = c.NotAfter
			}
		}
		v.known.add(keys[i], known)
		return known, nil
	}
	return nil, reason
}

func (r Root) intermediate(signer abi.ReportSigner) *x509.Certificate {
	if signer == abi.VlekReportSigner {
		return r.ASVK
	}
	return r.ASK
}

// chainTo verifies leaf, intermediate and root against nothing but the
// configured ones, since a certificate of any other origin proves nothing.
func chainTo(root Root, signer abi.ReportSigner, cert *x509.Certificate, now time.Time) ([]*x509.Certificate, error) {
	middle := root.intermediate(signer)
	if middle == nil {
		return nil, fmt.Errorf("%w: root %q has no intermediate for a %s", ErrUntrusted, root.Name, signer)
	}
	roots, middles := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root.ARK)
	middles.AddCert(middle)
	chains, err := cert.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: middles, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return nil, fmt.Errorf("%w: %q is valid from %s to %s, this machine's clock says %s", ErrExpired, invalid.Cert.Subject.CommonName,
			invalid.Cert.NotBefore.Format(time.RFC3339), invalid.Cert.NotAfter.Format(time.RFC3339), now.Format(time.RFC3339))
	}
	if err != nil {
		return nil, fmt.Errorf("%w: issued by %q: %w", ErrUntrusted, cert.Issuer.CommonName, err)
	}
	// Exactly leaf, intermediate, root: not a leaf that the root itself signed.
	if len(chains) != 1 || len(chains[0]) != 3 || !chains[0][1].Equal(middle) || !chains[0][2].Equal(root.ARK) {
		return nil, fmt.Errorf("%w: issued by %q", ErrUntrusted, cert.Issuer.CommonName)
	}
	return chains[0], nil
}

func parseCRL(der []byte) (*x509.RevocationList, error) {
	if len(der) > maxCRL {
		return nil, fmt.Errorf("%w: revocation list of %d bytes", ErrMalformed, len(der))
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCRL, err)
	}
	// A critical extension narrows what the list speaks of, or makes it an addition
	// to another one. crypto/x509 leaves that to its callers.
	for _, ext := range list.Extensions {
		if ext.Critical {
			return nil, fmt.Errorf("%w: critical extension %s", ErrCRL, ext.Id)
		}
	}
	return list, nil
}

// signedList demands that the root signed the list.
func signedList(list *x509.RevocationList, ark *x509.Certificate) error {
	if err := list.CheckSignatureFrom(ark); err != nil {
		return fmt.Errorf("%w: it is not signed by %q: %w", ErrCRL, ark.Subject.CommonName, err)
	}
	return nil
}

// currentList demands that the list is of this time.
func currentList(list *x509.RevocationList, now time.Time) error {
	if list.NextUpdate.IsZero() || now.Before(list.ThisUpdate) || now.After(list.NextUpdate) {
		return fmt.Errorf("%w: it is valid from %s to %s, this machine's clock says %s", ErrCRL,
			list.ThisUpdate.Format(time.RFC3339), list.NextUpdate.Format(time.RFC3339), now.Format(time.RFC3339))
	}
	return nil
}

// known remembers what was vouched for, since a machine comes back with the same
// certificate for years. What it remembers holds for exactly these bytes of root,
// intermediate, certificate and list, and only while all of them are valid.
type known struct {
	mu sync.Mutex
	m  map[[sha256.Size]byte]*vouched
}

// maxKnown bounds the cache; a full one is emptied.
const maxKnown = 4096

func cacheKey(root Root, signer abi.ReportSigner, der, crl []byte) (key [sha256.Size]byte) {
	h := sha256.New()
	var middle []byte
	if c := root.intermediate(signer); c != nil {
		middle = c.Raw
	}
	for _, part := range [][]byte{[]byte(root.Name), []byte(root.Product), root.ARK.Raw, {byte(signer)}, middle, der, crl} {
		var size [4]byte
		binary.BigEndian.PutUint32(size[:], uint32(len(part)))
		h.Write(size[:])
		h.Write(part)
	}
	h.Sum(key[:0])
	return key
}

func (k *known) get(key [sha256.Size]byte, now time.Time) *vouched {
	k.mu.Lock()
	defer k.mu.Unlock()
	v := k.m[key]
	if v == nil || now.Before(v.from) || now.After(v.to) {
		return nil
	}
	return v
}

func (k *known) add(key [sha256.Size]byte, v *vouched) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.m == nil || len(k.m) >= maxKnown {
		k.m = map[[sha256.Size]byte]*vouched{}
	}
	k.m[key] = v
}
