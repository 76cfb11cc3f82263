package kinds

import (
	"bytes"
	"context"
	"strings"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/facts"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/snp"
)

func snpKind() Kind {
	return Kind{
		Kind: ofPolicy(attestation.SNP),
		Detect: func(_ context.Context, o IssuerOptions) (string, error) {
			how, err := snp.Detect(o.snp())
			return "reports through " + how, err
		},
		Issuer: func(o IssuerOptions) (attestation.Issuer, error) { return snp.NewIssuer(o.snp()) },
		Verifier: func(v *Maker) (attestation.Verifier, error) {
			return snp.NewVerifier(snp.VerifierOptions{
				Trust: func() snp.Trust { return snpTrust(v.Policy()) }, Endorsements: v.Endorsements, Memory: v.Memory, Now: v.Now})
		},
		Summarize: func(x Exchange) (Summary, error) {
			e, err := decode[attestv1.SNPEvidence](x.Evidence)
			if err != nil {
				return nil, err
			}
			return snp.Summarize(e)
		},
		Claims: func(x Exchange) ([]attestation.Claims, error) {
			e, err := decode[attestv1.SNPEvidence](x.Evidence)
			if err != nil {
				return nil, err
			}
			return snpClaims(e, "")
		},
		Endorsements: func(evidence []byte, product string) ([]endorsement.Request, error) {
			e, err := decode[attestv1.SNPEvidence](evidence)
			if err != nil {
				return nil, err
			}
			return snp.EndorsementRequests(e.GetReport(), product)
		},
	}
}

func (o IssuerOptions) snp() snp.IssuerOptions {
	return snp.IssuerOptions{Endorsements: o.Endorsements, Log: o.Log}
}

func snpClaims(e *attestv1.SNPEvidence, via attestation.Kind) ([]attestation.Claims, error) {
	r, err := snp.Parse(e.GetReport())
	if err != nil {
		return nil, err
	}
	c := r.Claims()
	c.Via = via
	// A report of version 2 does not name its product line: its certificate does.
	if s, err := snp.Summarize(e); err == nil {
		facts.SNPProduct.Put(c.Facts, s.Product)
	}
	return []attestation.Claims{c}, nil
}

func snpTrust(p *policy.Policy) snp.Trust {
	var t snp.Trust
	for _, r := range p.Trust().SNP().Roots {
		if r.Builtin == "" {
			t.Roots = append(t.Roots, amdRoot(r))
			continue
		}
		for _, known := range snp.AMD() {
			known.Name = r.Name
			t.Roots = append(t.Roots, known)
		}
	}
	return t
}

// amdRoot tells the certificates of an authority apart by what they are: the
// self-signed one is the root, and the one for loaded keys says so in its name.
func amdRoot(r policy.Root) snp.Root {
	root := snp.Root{Name: r.Name, Product: r.Product}
	for _, c := range r.Certificates() {
		switch {
		case bytes.Equal(c.RawIssuer, c.RawSubject):
			root.ARK = c
		case strings.HasPrefix(c.Subject.CommonName, "SEV-VLEK-"):
			root.ASVK = c
		default:
			root.ASK = c
		}
	}
	return root
}
