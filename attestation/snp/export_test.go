package snp

import (
	"time"

	"github.com/google/go-sev-guest/client"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// WithDevice has the issuer use a driver that is not the kernel's.
func (o IssuerOptions) WithDevice(open func() client.Device) IssuerOptions {
	o.open = open
	return o
}

// VerifyWithoutCRL is a verification step by step, of evidence that was recorded
// without a revocation list: everything but that list, which the caller answers
// for. There is no such way in the package itself.
func VerifyWithoutCRL(roots []Root, ev *attestv1.SNPEvidence, now time.Time) (attestation.Claims, error) {
	r, err := Parse(ev.GetReport())
	if err != nil {
		return attestation.Claims{}, err
	}
	l, err := parseLeaf(ev.GetCertificate(), r.signer)
	if err != nil {
		return attestation.Claims{}, err
	}
	product := r.Product
	if product == "" {
		product = l.product
	}
	reason := error(ErrUntrusted)
	for _, root := range roots {
		if root.Product != product {
			continue
		}
		if _, reason = chainTo(root, r.signer, l.cert, now); reason != nil {
			continue
		}
		s, err := (&vouched{leaf: l, trust: "root:" + root.Name, product: product}).verify(r)
		if err != nil {
			return attestation.Claims{}, err
		}
		return s.claims(), nil
	}
	return attestation.Claims{}, reason
}

// TableLeaf is the VCEK of a certificate table.
func TableLeaf(table []byte) ([]byte, error) {
	entries, err := parseTable(table)
	return leafOf(entries, 0), err
}

// ParseLeaf says what a VCEK is of.
func ParseLeaf(der []byte) (product string, chip []byte, tcb string, err error) {
	l, err := parseLeaf(der, 0)
	if err != nil {
		return "", nil, "", err
	}
	return l.product, l.chip, l.tcb.String(), nil
}

// Known is how many chains a verifier remembers.
func (v *Verifier) Known() int { return len(v.known.m) }
