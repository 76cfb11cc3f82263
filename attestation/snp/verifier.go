package snp

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-sev-guest/abi"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/internal/wire"
)

// VerifierOptions configure [NewVerifier].
type VerifierOptions struct {
	// Trust is asked for each piece of evidence, so that a reloaded policy takes
	// effect. Required.
	Trust func() Trust
	// Endorsements has what evidence does not carry. Nil: only what is carried.
	Endorsements endorsement.Source
	// Memory has what other evidence and the source said before. Default: one of its own.
	Memory *endorsement.Memory
	// Now is the clock for certificates and lists. Default time.Now.
	Now func() time.Time
}

// Verifier checks SEV-SNP evidence.
type Verifier struct {
	trust        func() Trust
	endorsements endorsement.Source
	memory       *endorsement.Memory
	now          func() time.Time
	known        known
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
	if opts.Memory == nil {
		opts.Memory = &endorsement.Memory{}
	}
	return &Verifier{trust: opts.Trust, endorsements: opts.Endorsements, memory: opts.Memory, now: opts.Now}, nil
}

// Kind implements attestation.Verifier.
func (*Verifier) Kind() attestation.Kind { return attestation.SNP }

// Begin implements attestation.Verifier. An offer says nothing, and nothing is
// asked for but a report over the binder.
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
func (q question) Verify(ctx context.Context, evidence []byte, binder attestation.Binder) ([]attestation.Claims, error) {
	var ev attestv1.SNPEvidence
	if err := wire.Unmarshal(evidence, &ev); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	c, err := q.v.VerifyReport(ctx, &ev, binder)
	if err != nil {
		return nil, err
	}
	c.EvidenceDigest = sha256.Sum256(evidence)
	return []attestation.Claims{c}, nil
}

// VerifyReport verifies a report with its endorsements and demands that it covers
// reportData. It is for evidence in which a report vouches for something else than
// a binder; the digest of the claims is that of the report.
func (v *Verifier) VerifyReport(ctx context.Context, ev *attestv1.SNPEvidence, reportData [64]byte) (attestation.Claims, error) {
	var none attestation.Claims
	t := v.trust()
	if err := t.check(); err != nil {
		return none, err
	}
	r, err := Parse(ev.GetReport())
	if err != nil {
		return none, err
	}
	der, err := v.certificate(ctx, t, r, ev.GetCertificate())
	if err != nil {
		return none, err
	}
	crl, err := v.crl(ctx, t, r, der, ev.GetCrl())
	if err != nil {
		return none, err
	}
	k, err := v.vouch(t, r.signer, r.Product, der, crl)
	if errors.Is(err, ErrCRL) && len(ev.GetCrl()) > 0 {
		switch newer, askErr := v.renewed(ctx, t, r, der, ev.GetCrl()); {
		case askErr != nil:
			err = askErr
		case newer != nil:
			k, err = v.vouch(t, r.signer, r.Product, der, newer)
		}
	}
	if err != nil {
		return none, err
	}
	s, err := k.verify(r)
	if err != nil {
		return none, err
	}
	if !bytes.Equal(r.ReportData[:], reportData[:]) {
		return none, ErrReportData
	}
	return s.claims(), nil
}

// verified is a report that a vouched key signed. Only [vouched.verify] makes it.
type verified struct {
	report *Report
	by     *vouched
}

// verify demands that the key belongs to the report, and that it signed it.
func (k *vouched) verify(r *Report) (verified, error) {
	if err := k.matches(r, k.product); err != nil {
		return verified{}, err
	}
	digest := sha512.Sum384(abi.SignedComponent(r.raw[:]))
	signature, err := abi.ReportToSignatureDER(r.raw[:])
	if err != nil || !ecdsa.VerifyASN1(k.key, digest[:], signature) {
		return verified{}, ErrSignature
	}
	return verified{r, k}, nil
}

func (s verified) claims() attestation.Claims {
	c := s.report.claims(s.by.product, s.by.csp)
	c.Trust, c.Until = s.by.trust, s.by.to
	return c
}
