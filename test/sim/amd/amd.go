// Package amd is a synthetic AMD for tests: roots, chips, reports, revocation
// lists, and the service that gives certificates out. Nothing that it signs is
// accepted by a verifier that trusts AMD.
//
// The keys of its roots are those that go-sev-guest publishes for its own tests,
// since RSA keys of this size are slow to make.
package amd

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"sync"
	"time"

	"github.com/google/go-sev-guest/testing/data"

	"github.com/keyagent/keyagent/attestation/snp"
)

// The serial numbers of the intermediates, for revocation lists. A real VCEK has
// serial number 0, and so has one of a [Chip].
var (
	ASKSerial  = big.NewInt(0x10001)
	ASVKSerial = big.NewInt(0x10002)
)

// Options of [New]. Unset fields take the stated default.
type Options struct {
	// Product is the product line. Default "Milan".
	Product string
	// Forged makes roots with the same names and other keys.
	Forged bool
	// NotBefore and NotAfter of the authorities. Default a day ago, and 25 years
	// later.
	NotBefore, NotAfter time.Time
}

// Authority is the roots of one product line.
type Authority struct {
	Product        string
	ARK, ASK, ASVK *x509.Certificate
	ark, ask, asvk *rsa.PrivateKey
}

var forged = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

// New makes the roots of a product line.
func New(opts Options) (*Authority, error) {
	if opts.Product == "" {
		opts.Product = "Milan"
	}
	if opts.NotBefore.IsZero() {
		opts.NotBefore = time.Now().Add(-24 * time.Hour)
	}
	if opts.NotAfter.IsZero() {
		opts.NotAfter = opts.NotBefore.AddDate(25, 0, 0)
	}
	a := &Authority{Product: opts.Product, ark: data.ARKPrivateKey, ask: data.ASKPrivateKey, asvk: data.ASVKPrivateKey}
	if opts.Forged {
		key, err := forged()
		if err != nil {
			return nil, err
		}
		a.ark, a.ask, a.asvk = key, key, key
	}
	authority := func(name, path string, serial *big.Int, usage x509.KeyUsage, parent *x509.Certificate, key, signer *rsa.PrivateKey) (*x509.Certificate, error) {
		t := &x509.Certificate{
			SerialNumber: serial, Subject: Name(name), NotBefore: opts.NotBefore, NotAfter: opts.NotAfter,
			SignatureAlgorithm: x509.SHA384WithRSAPSS, IsCA: true, BasicConstraintsValid: true, KeyUsage: usage,
			CRLDistributionPoints: []string{fmt.Sprintf("%s/%s/v1/%s/crl", snp.KDS, path, opts.Product)},
		}
		if parent == nil {
			parent = t
		}
		return certify(t, parent, key.Public(), signer)
	}
	var err error
	if a.ARK, err = authority("ARK-"+opts.Product, "vcek", big.NewInt(0x10000), x509.KeyUsageCertSign|x509.KeyUsageCRLSign, nil, a.ark, a.ark); err != nil {
		return nil, err
	}
	if a.ASK, err = authority("SEV-"+opts.Product, "vcek", ASKSerial, x509.KeyUsageCertSign, a.ARK, a.ask, a.ark); err != nil {
		return nil, err
	}
	a.ASVK, err = authority("SEV-VLEK-"+opts.Product, "vlek", ASVKSerial, x509.KeyUsageCertSign, a.ARK, a.asvk, a.ark)
	return a, err
}

// Name is a subject as AMD writes it.
func Name(common string) pkix.Name {
	return pkix.Name{
		Country: []string{"US"}, Locality: []string{"Santa Clara"}, Province: []string{"CA"},
		Organization: []string{"Advanced Micro Devices"}, OrganizationalUnit: []string{"Engineering"}, CommonName: common,
	}
}

func certify(template, parent *x509.Certificate, key crypto.PublicKey, signer crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// Root is what a verifier trusts.
func (a *Authority) Root(name string) snp.Root {
	return snp.Root{Name: name, Product: a.Product, ARK: a.ARK, ASK: a.ASK, ASVK: a.ASVK}
}

// Trust is in this authority alone, under the name "lab".
func (a *Authority) Trust() snp.Trust { return snp.Trust{Roots: []snp.Root{a.Root("lab")}} }

// CRL is the revocation list from one time to another.
func (a *Authority) CRL(from, to time.Time, revoked ...*big.Int) ([]byte, error) {
	return a.list(&x509.RevocationList{ThisUpdate: from, NextUpdate: to}, revoked)
}

func (a *Authority) list(t *x509.RevocationList, revoked []*big.Int) ([]byte, error) {
	t.Number, t.SignatureAlgorithm = big.NewInt(4), x509.SHA384WithRSAPSS
	for _, serial := range revoked {
		t.RevokedCertificateEntries = append(t.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: serial, RevocationTime: t.ThisUpdate})
	}
	return x509.CreateRevocationList(rand.Reader, t, a.ARK, a.ark)
}

// CRLWith is a revocation list with more extensions.
func (a *Authority) CRLWith(from, to time.Time, extensions ...pkix.Extension) ([]byte, error) {
	return a.list(&x509.RevocationList{ThisUpdate: from, NextUpdate: to, ExtraExtensions: extensions}, nil)
}
