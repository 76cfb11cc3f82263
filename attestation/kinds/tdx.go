package kinds

import (
	"context"
	"crypto/x509"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/tdx"
)

func tdxKind() Kind {
	return Kind{
		Kind: ofPolicy(attestation.TDX),
		Detect: func(_ context.Context, o IssuerOptions) (string, error) {
			how, err := tdx.Detect(o.tdx())
			return "quotes through " + how, err
		},
		Issuer: func(o IssuerOptions) (attestation.Issuer, error) { return tdx.NewIssuer(o.tdx()) },
		Verifier: func(v *Maker) (attestation.Verifier, error) {
			return tdx.NewVerifier(tdx.VerifierOptions{
				Trust: func() tdx.Trust { return tdxTrust(v.Policy()) }, Endorsements: v.Endorsements, Memory: v.Memory, Now: v.Now})
		},
		Summarize: func(x Exchange) (Summary, error) {
			e, err := decode[attestv1.TDXEvidence](x.Evidence)
			if err != nil {
				return nil, err
			}
			return tdx.Summarize(e)
		},
		Claims: func(x Exchange) ([]attestation.Claims, error) {
			e, err := decode[attestv1.TDXEvidence](x.Evidence)
			if err != nil {
				return nil, err
			}
			return tdxClaims(e, "")
		},
		Endorsements: func(evidence []byte, _ string) ([]endorsement.Request, error) {
			e, err := decode[attestv1.TDXEvidence](evidence)
			if err != nil {
				return nil, err
			}
			return tdx.EndorsementRequests(e.GetQuote())
		},
	}
}

func (o IssuerOptions) tdx() tdx.IssuerOptions {
	return tdx.IssuerOptions{Endorsements: o.Endorsements, Log: o.Log}
}

func tdxClaims(e *attestv1.TDXEvidence, via attestation.Kind) ([]attestation.Claims, error) {
	c, err := tdx.UnverifiedClaims(e)
	c.Via = via
	return []attestation.Claims{c}, err
}

func tdxTrust(p *policy.Policy) tdx.Trust {
	var t tdx.Trust
	for _, r := range p.Trust().TDX().Roots {
		t.Roots = append(t.Roots, tdx.Root{Name: r.Name, Certificate: rootOf(r, func() *x509.Certificate { return tdx.Intel().Certificate })})
	}
	return t
}

// rootOf is the certificate of a root that may be built in.
func rootOf(r policy.Root, builtin func() *x509.Certificate) *x509.Certificate {
	if r.Builtin != "" {
		return builtin()
	}
	return r.Certificate()
}
