package setup

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/azure"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/nitro"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/svsm"
	"github.com/keyagent/keyagent/attestation/tdx"
	"github.com/keyagent/keyagent/attestation/tpm"
)

// VerifierOptions configure [Verifiers].
type VerifierOptions struct {
	// Policy returns the policy in force. Required.
	Policy func() *policy.Policy
	// Endorsements has what evidence does not carry. Nil: nothing has.
	Endorsements endorsement.Source
	// Now is the clock for certificates. Default time.Now.
	Now func() time.Time
}

// Verifiers returns a verifier of each kind, with the trust of the policy in
// force. A kind that the policy trusts nobody for refuses everything.
func Verifiers(opts VerifierOptions) ([]attestation.Verifier, error) {
	if opts.Policy == nil {
		return nil, errors.New("verifiers without a policy")
	}
	t, err := tpm.NewVerifier(tpm.VerifierOptions{Trust: func() tpm.Trust { return tpmTrust(opts.Policy()) }, Now: opts.Now})
	if err != nil {
		return nil, err
	}
	s, err := snp.NewVerifier(snp.VerifierOptions{
		Trust: func() snp.Trust { return snpTrust(opts.Policy()) }, Endorsements: opts.Endorsements, Now: opts.Now})
	if err != nil {
		return nil, err
	}
	d, err := tdx.NewVerifier(tdx.VerifierOptions{
		Trust: func() tdx.Trust { return tdxTrust(opts.Policy()) }, Endorsements: opts.Endorsements, Now: opts.Now})
	if err != nil {
		return nil, err
	}
	pcrs := func() []uint32 { return opts.Policy().PCRs() }
	v, err := svsm.NewVerifier(s, pcrs)
	if err != nil {
		return nil, err
	}
	a, err := azure.NewVerifier(azure.VerifierOptions{
		SNP: s, TDX: d, PCRs: pcrs, Token: func() *azure.TokenOptions { return azureToken(opts.Policy()) }, Now: opts.Now})
	if err != nil {
		return nil, err
	}
	n, err := nitro.NewVerifier(nitro.VerifierOptions{Trust: func() nitro.Trust { return nitroTrust(opts.Policy()) }, Now: opts.Now})
	if err != nil {
		return nil, err
	}
	return []attestation.Verifier{t, s, d, a, v, n}, nil
}

// tpmTrust translates a policy for the TPM verifier.
func tpmTrust(p *policy.Policy) tpm.Trust {
	from := p.Trust().TPM
	t := tpm.Trust{PCRs: p.PCRs()}
	for _, r := range from.Roots {
		t.Roots = append(t.Roots, tpmRoot(r))
	}
	for _, r := range from.AKRoots {
		if r.Builtin == "" {
			t.AKRoots = append(t.AKRoots, tpmRoot(r))
			continue
		}
		for _, known := range tpm.Google() {
			known.Name, known.CRLs = r.Name, r.RevocationLists()
			t.AKRoots = append(t.AKRoots, known)
		}
	}
	for _, e := range from.Enrolled {
		t.Enrolled = append(t.Enrolled, tpm.Enrolled{Name: e.Name, EKDigest: e.EK})
	}
	return t
}

func tpmRoot(r policy.Root) tpm.Root {
	return tpm.Root{Name: r.Name, Certificate: r.Certificate(), Intermediates: r.Certificates(), CRLs: r.RevocationLists()}
}

func snpTrust(p *policy.Policy) snp.Trust {
	var t snp.Trust
	for _, r := range p.Trust().SNP.Roots {
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

func tdxTrust(p *policy.Policy) tdx.Trust {
	var t tdx.Trust
	for _, r := range p.Trust().TDX.Roots {
		root := tdx.Root{Name: r.Name, Certificate: rootOf(r, func() *x509.Certificate { return tdx.Intel().Certificate })}
		t.Roots = append(t.Roots, root)
	}
	return t
}

// azureToken says whose tokens the policy believes, if it does.
func azureToken(p *policy.Policy) *azure.TokenOptions {
	from := p.Trust().Azure
	if from.Issuer == "" {
		return nil
	}
	return &azure.TokenOptions{Issuer: from.Issuer, JWKS: func(context.Context) ([]byte, error) { return from.KeySet(), nil }}
}

func nitroTrust(p *policy.Policy) nitro.Trust {
	var t nitro.Trust
	for _, r := range p.Trust().Nitro.Roots {
		root := nitro.Root{Name: r.Name, Certificate: rootOf(r, func() *x509.Certificate { return nitro.AWS()[0].Certificate })}
		t.Roots = append(t.Roots, root)
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
