package kinds

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"slices"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
	"github.com/keyagent/keyagent/attestation/nitro"
	"github.com/keyagent/keyagent/attestation/policy"
)

func nitroKind() Kind {
	return Kind{
		Kind: ofPolicy(attestation.Nitro),
		Detect: func(ctx context.Context, o IssuerOptions) (string, error) {
			i, err := nitro.NewIssuer(nitro.IssuerOptions{Open: o.openTPM})
			if err != nil {
				return "", err
			}
			a, err := i.Begin(ctx)
			if err != nil {
				return "", err
			}
			return "the TPM is AWS's NitroTPM", a.Close()
		},
		Issuer: func(o IssuerOptions) (attestation.Issuer, error) {
			return nitro.NewIssuer(nitro.IssuerOptions{Open: o.openTPM})
		},
		Verifier: func(v *Maker) (attestation.Verifier, error) {
			return nitro.NewVerifier(nitro.VerifierOptions{Trust: func() nitro.Trust { return nitroTrust(v.Policy()) }, Now: v.Now})
		},
		Summarize: func(x Exchange) (Summary, error) {
			c, err := nitroClaims(x)
			if err != nil {
				return nil, err
			}
			out := nitroSummary{PCRs: map[string]string{}}
			out.Module, _ = facts.NitroModuleID.Of(c)
			for name, m := range c.Measurements {
				out.PCRs[name] = hex.EncodeToString(m.Value)
			}
			return out, nil
		},
		Claims: func(x Exchange) ([]attestation.Claims, error) {
			c, err := nitroClaims(x)
			return []attestation.Claims{c}, err
		},
	}
}

// nitroSummary is what an attestation document says.
type nitroSummary struct {
	Module string            `json:"module_id"`
	PCRs   map[string]string `json:"pcrs"`
}

// Print implements Summary.
func (n nitroSummary) Print(w io.Writer) {
	fmt.Fprintf(w, "instance      %s\n", n.Module)
	printPCRs(w, n.PCRs)
}

func printPCRs(w io.Writer, pcrs map[string]string) {
	for _, name := range slices.Sorted(maps.Keys(pcrs)) {
		fmt.Fprintf(w, "%-13s %s\n", name, pcrs[name])
	}
}

func nitroClaims(x Exchange) (attestation.Claims, error) {
	e, err := decode[attestv1.NitroEvidence](x.Evidence)
	if err != nil {
		return attestation.Claims{}, err
	}
	return nitro.UnverifiedClaims(e.GetDocument())
}

func nitroTrust(p *policy.Policy) nitro.Trust {
	var t nitro.Trust
	for _, r := range p.Trust().Nitro().Roots {
		t.Roots = append(t.Roots, nitro.Root{Name: r.Name, Certificate: rootOf(r, func() *x509.Certificate { return nitro.AWS()[0].Certificate })})
	}
	return t
}
