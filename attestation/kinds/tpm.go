package kinds

import (
	"context"

	"github.com/google/go-tpm/tpm2/transport"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/tpm"
)

func tpmKind() Kind {
	return Kind{
		Kind: ofPolicy(attestation.TPM),
		Detect: func(_ context.Context, o IssuerOptions) (string, error) {
			t, err := o.openTPM()
			if err != nil {
				return "", err
			}
			return "a TPM at " + o.device(), t.Close()
		},
		Issuer: func(o IssuerOptions) (attestation.Issuer, error) { return tpm.NewIssuer(o.tpm()) },
		Verifier: func(v *Maker) (attestation.Verifier, error) {
			return tpm.NewVerifier(tpm.VerifierOptions{Trust: func() tpm.Trust { return tpmTrust(v.Policy()) }, Now: v.Now})
		},
		Summarize: func(x Exchange) (Summary, error) { return tpm.Summarize(x.Offer, x.Ask, x.Evidence) },
		Claims: func(x Exchange) ([]attestation.Claims, error) {
			c, err := tpm.UnverifiedClaims(x.Offer, x.Ask, x.Evidence)
			return []attestation.Claims{c}, err
		},
	}
}

func (o IssuerOptions) tpm() tpm.IssuerOptions {
	t := o.TPM
	if t.Log == nil {
		t.Log = o.Log
	}
	return t
}

func (o IssuerOptions) device() string {
	if o.TPM.Device == "" {
		return tpm.DefaultDevice
	}
	return o.TPM.Device
}

func (o IssuerOptions) openTPM() (transport.TPMCloser, error) { return tpm.OpenDevice(o.device()) }

// tpmTrust translates a policy for the TPM verifier.
func tpmTrust(p *policy.Policy) tpm.Trust {
	from := p.Trust().TPM()
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
