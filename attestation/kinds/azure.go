package kinds

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/azure"
	"github.com/keyagent/keyagent/attestation/azure/maa"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tdx"
	"github.com/keyagent/keyagent/attestation/tpm"
)

func azureKind() Kind {
	return Kind{
		Kind: ofPolicy(attestation.Azure),
		Detect: func(_ context.Context, o IssuerOptions) (string, error) {
			below, err := azure.Detect(o.azure())
			return fmt.Sprintf("the vTPM has a report of Azure's, with %s below", below), err
		},
		Issuer: func(o IssuerOptions) (attestation.Issuer, error) {
			opts := o.azure()
			if o.Attestation != "" {
				var err error
				if opts.Token, err = maa.New(maa.Options{URL: o.Attestation, Device: o.TPM.Device, EventLog: o.TPM.EventLog, IMDS: o.Metadata}); err != nil {
					return nil, err
				}
			}
			return azure.NewIssuer(opts)
		},
		Verifier: func(v *Maker) (attestation.Verifier, error) {
			s, err := carried[*snp.Verifier](v, attestation.SNP)
			if err != nil {
				return nil, err
			}
			d, err := carried[*tdx.Verifier](v, attestation.TDX)
			if err != nil {
				return nil, err
			}
			return azure.NewVerifier(azure.VerifierOptions{
				SNP: s, TDX: d, PCRs: v.pcrs, Token: func() *azure.TokenOptions { return azureToken(v.Policy()) }, Now: v.Now})
		},
		Summarize: summarizeAzure,
		Claims:    azureClaims,
		Endorsements: func(evidence []byte, product string) ([]endorsement.Request, error) {
			e, err := decode[attestv1.AzureEvidence](evidence)
			if err != nil {
				return nil, err
			}
			r, err := azure.Parse(e.GetHclReport())
			switch {
			case err != nil:
				return nil, err
			case r.Isolation == attestation.SNP:
				return snp.EndorsementRequests(r.Hardware, product)
			}
			return tdx.EndorsementRequests(e.GetTdx().GetQuote())
		},
	}
}

func (o IssuerOptions) azure() azure.IssuerOptions {
	return azure.IssuerOptions{Device: o.TPM.Device, EventLog: o.TPM.EventLog, IMDS: o.Metadata, Endorsements: o.Endorsements, Log: o.Log}
}

// azureSummary is the VM, its hardware and the registers of its vTPM.
type azureSummary struct {
	VM       *azure.Summary    `json:"vm"`
	Hardware Summary           `json:"hardware"`
	PCRs     map[string]string `json:"pcrs"`
}

// Print implements Summary.
func (a azureSummary) Print(w io.Writer) {
	fmt.Fprintf(w, "VM            %s\nbelow it      %s, HCL version %d\nsecure boot   %t\nconsole       %t\n", a.VM.VM, a.VM.Isolation, a.VM.HCL, a.VM.SecureBoot, a.VM.Console)
	a.Hardware.Print(w)
	printPCRs(w, a.PCRs)
}

// azureParts are what an exchange has.
func azureParts(x Exchange) (*attestv1.AzureAsk, *attestv1.AzureEvidence, *azure.Report, error) {
	q, err1 := decode[attestv1.AzureAsk](x.Ask)
	e, err2 := decode[attestv1.AzureEvidence](x.Evidence)
	if err := errors.Join(err1, err2); err != nil {
		return nil, nil, nil, err
	}
	r, err := azure.Parse(e.GetHclReport())
	return q, e, r, err
}

func summarizeAzure(x Exchange) (Summary, error) {
	q, e, r, err := azureParts(x)
	if err != nil {
		return nil, err
	}
	out := azureSummary{PCRs: map[string]string{}}
	if out.VM, err = azure.Summarize(e.GetHclReport()); err != nil {
		return nil, err
	}
	if r.Isolation == attestation.SNP {
		out.Hardware, err = snp.Summarize(withReport(e.GetSnp(), r.Hardware))
	} else {
		out.Hardware, err = tdx.Summarize(e.GetTdx())
	}
	if err != nil {
		return nil, err
	}
	vtpm, err := tpm.UnverifiedQuote(nil, q.GetPcrs(), e.GetQuote())
	for name, m := range vtpm.Measurements {
		out.PCRs[name] = hex.EncodeToString(m.Value)
	}
	return out, err
}

// withReport puts the report, which stands elsewhere in Azure's evidence, beside
// its endorsements.
func withReport(e *attestv1.SNPEvidence, report []byte) *attestv1.SNPEvidence {
	return &attestv1.SNPEvidence{Report: report, Certificate: e.GetCertificate(), Crl: e.GetCrl()}
}

func azureClaims(x Exchange) ([]attestation.Claims, error) {
	q, e, r, err := azureParts(x)
	if err != nil {
		return nil, err
	}
	var hw []attestation.Claims
	if r.Isolation == attestation.SNP {
		hw, err = snpClaims(withReport(e.GetSnp(), r.Hardware), attestation.Azure)
	} else {
		hw, err = tdxClaims(e.GetTdx(), attestation.Azure)
	}
	if err != nil {
		return nil, err
	}
	vtpm, err := tpm.UnverifiedQuote(nil, q.GetPcrs(), e.GetQuote())
	vtpm.Trust, vtpm.Via = string(attestation.Azure), attestation.Azure
	return append(hw, r.Claims(), vtpm), err
}

// azureToken says whose tokens the policy believes, if it does.
func azureToken(p *policy.Policy) *azure.TokenOptions {
	from := p.Trust().Azure()
	if from.Issuer == "" {
		return nil
	}
	return &azure.TokenOptions{Issuer: from.Issuer, JWKS: func(context.Context) ([]byte, error) { return from.KeySet(), nil }}
}
