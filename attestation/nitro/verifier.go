package nitro

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
	"github.com/keyagent/keyagent/internal/wire"
)

// VerifierOptions configure [NewVerifier].
type VerifierOptions struct {
	// Trust is asked for each piece of evidence, so that a reloaded policy takes
	// effect. Required.
	Trust func() Trust
	// Now is the clock for certificates, which AWS makes for hours. Default time.Now.
	Now func() time.Time
}

// Verifier checks attestation documents.
type Verifier struct {
	trust func() Trust
	now   func() time.Time
}

var _ attestation.Verifier = (*Verifier)(nil)

// NewVerifier returns a verifier. Options without Trust are refused.
func NewVerifier(opts VerifierOptions) (*Verifier, error) {
	if opts.Trust == nil {
		return nil, fmt.Errorf("%w: no trust", ErrConfiguration)
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	return &Verifier{opts.Trust, opts.Now}, nil
}

// Kind implements attestation.Verifier.
func (*Verifier) Kind() attestation.Kind { return attestation.Nitro }

// Begin implements attestation.Verifier. An offer says nothing, and nothing is
// asked for but a document over the binder.
func (v *Verifier) Begin(_ context.Context, offer []byte) (attestation.Question, error) {
	if err := v.trust().check(); err != nil {
		return nil, err
	}
	if len(offer) > 0 {
		return nil, fmt.Errorf("%w: an offer of %d bytes", ErrMalformed, len(offer))
	}
	return question{v}, nil
}

type question struct{ v *Verifier }

// Ask implements attestation.Question.
func (question) Ask() []byte { return nil }

// Verify implements attestation.Question.
func (q question) Verify(_ context.Context, evidence []byte, binder attestation.Binder) ([]attestation.Claims, error) {
	trust := q.v.trust()
	if err := trust.check(); err != nil {
		return nil, err
	}
	var ev attestv1.NitroEvidence
	if err := wire.Unmarshal(evidence, &ev); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	c, err := verify(trust, ev.GetDocument(), q.v.now())
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(c.document.Nonce, binder[:]) {
		return nil, ErrNonce
	}
	claims := c.claims()
	claims.EvidenceDigest = sha256.Sum256(evidence)
	return []attestation.Claims{claims}, nil
}

// verified is a document that a configured root vouches for. Only [verify] makes it.
type verified struct {
	document *document
	trust    string
	until    time.Time
}

func verify(trust Trust, data []byte, now time.Time) (verified, error) {
	s, d, err := parse(data)
	if err != nil {
		return verified{}, err
	}
	cert, key, err := d.certificate()
	if err != nil {
		return verified{}, err
	}
	name, until, err := chain(trust, cert, d.Bundle, now)
	if err != nil {
		return verified{}, err
	}
	if !s.verify(key) {
		return verified{}, ErrSignature
	}
	return verified{d, "root:" + name, until}, nil
}

// chain verifies a certificate against each root by itself, so that the result
// names the root that vouched, and until when the whole chain is valid. The bundle
// begins with a root as well, which is not believed.
func chain(trust Trust, cert *x509.Certificate, bundle [][]byte, now time.Time) (name string, until time.Time, err error) {
	middles := x509.NewCertPool()
	for _, der := range bundle {
		c, err := parseCertificate(der)
		if err != nil {
			return "", until, err
		}
		// All of AWS's keys are. Another one could be only work for a verifier.
		if key, ok := c.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P384() && key.Curve != elliptic.P256() {
			return "", until, fmt.Errorf("%w: %q in the bundle has no key on P-256 or P-384", ErrCertificate, c.Subject.CommonName)
		}
		middles.AddCert(c)
	}
	reason := fmt.Errorf("%w: issued by %q", ErrUntrusted, cert.Issuer.CommonName)
	for _, root := range trust.Roots {
		one := x509.NewCertPool()
		one.AddCert(root.Certificate)
		chains, err := cert.Verify(x509.VerifyOptions{
			Roots: one, Intermediates: middles, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		})
		if err == nil {
			return root.Name, earliest(chains[0]), nil
		}
		var invalid x509.CertificateInvalidError
		if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
			reason = fmt.Errorf("%w: %q is valid from %s to %s, this machine's clock says %s", ErrExpired, invalid.Cert.Subject.CommonName,
				invalid.Cert.NotBefore.Format(time.RFC3339), invalid.Cert.NotAfter.Format(time.RFC3339), now.Format(time.RFC3339))
		}
	}
	return "", until, reason
}

// earliest is when the first certificate of a chain ends.
func earliest(chain []*x509.Certificate) time.Time {
	return slices.MinFunc(chain, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
}

func (v verified) claims() attestation.Claims {
	d := v.document
	c := attestation.Claims{
		Kind:         attestation.Nitro,
		Identity:     d.instance(),
		Trust:        v.trust,
		Until:        v.until,
		Measurements: make(map[string]attestation.Measurement, len(d.PCRs)),
		Facts:        map[string]any{},
	}
	facts.NitroModuleID.Put(c.Facts, d.ModuleID)
	facts.NitroInstanceID.Put(c.Facts, d.instance())
	facts.NitroTimestamp.Put(c.Facts, d.Timestamp)
	for n, value := range d.PCRs {
		c.Measurements[fmt.Sprintf("pcr%d", n)] = attestation.Measurement{Value: value}
	}
	return c
}

// UnverifiedClaims reads what a document says, for display and for reference
// values of an instance that is trusted for another reason.
func UnverifiedClaims(document []byte) (attestation.Claims, error) {
	_, d, err := parse(document)
	if err != nil {
		return attestation.Claims{}, err
	}
	return verified{document: d}.claims(), nil
}
