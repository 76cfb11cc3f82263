package setup

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/azure"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/facts"
	"github.com/keyagent/keyagent/attestation/nitro"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tdx"
	"github.com/keyagent/keyagent/attestation/tpm"
)

// Summary is what one piece of evidence says, for people. None of it is verified.
type Summary interface {
	Print(w io.Writer)
}

// Summarize reads a file's evidence of one kind without verifying it.
func Summarize(s *attestv1.Saved, kind attestation.Kind) (Summary, error) {
	offer, ask, evidence, err := parts(s, kind)
	if err != nil {
		return nil, err
	}
	switch kind {
	case attestation.TPM:
		return tpm.Summarize(offer, ask, evidence)
	case attestation.SNP:
		e := &attestv1.SNPEvidence{}
		if err := unmarshal(evidence, e); err != nil {
			return nil, err
		}
		return snp.Summarize(e)
	case attestation.TDX:
		e := &attestv1.TDXEvidence{}
		if err := unmarshal(evidence, e); err != nil {
			return nil, err
		}
		return tdx.Summarize(e)
	case attestation.Azure:
		return summarizeAzure(ask, evidence)
	case attestation.SVSM:
		return summarizeSVSM(offer, ask, evidence)
	case attestation.Nitro:
		return summarizeNitro(evidence)
	}
	return nil, fmt.Errorf("%w: %q evidence", errUnknown, kind)
}

// nitroSummary is what an attestation document says.
type nitroSummary struct {
	Module string            `json:"module_id"`
	PCRs   map[string]string `json:"pcrs"`
}

// Print implements Summary.
func (n nitroSummary) Print(w io.Writer) {
	fmt.Fprintf(w, "instance      %s\n", n.Module)
	for _, name := range slices.Sorted(maps.Keys(n.PCRs)) {
		fmt.Fprintf(w, "%-13s %s\n", name, n.PCRs[name])
	}
}

func summarizeNitro(evidence []byte) (Summary, error) {
	c, err := nitroClaims(evidence)
	if err != nil {
		return nil, err
	}
	out := nitroSummary{PCRs: map[string]string{}}
	out.Module, _ = facts.NitroModuleID.Of(c)
	for name, m := range c.Measurements {
		out.PCRs[name] = hex.EncodeToString(m.Value)
	}
	return out, nil
}

func nitroClaims(evidence []byte) (attestation.Claims, error) {
	e := &attestv1.NitroEvidence{}
	if err := unmarshal(evidence, e); err != nil {
		return attestation.Claims{}, err
	}
	return nitro.UnverifiedClaims(e.GetDocument())
}

var errUnknown = fmt.Errorf("%w: kind that is not known here", attestation.ErrRefused)

// both is evidence of hardware and of the vTPM that it vouches for.
type both struct {
	Hardware Summary `json:"hardware"`
	VTPM     Summary `json:"vtpm"`
}

// Print implements Summary.
func (b both) Print(w io.Writer) {
	b.Hardware.Print(w)
	b.VTPM.Print(w)
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
	for _, name := range slices.Sorted(maps.Keys(a.PCRs)) {
		fmt.Fprintf(w, "%-13s %s\n", name, a.PCRs[name])
	}
}

func summarizeAzure(ask, evidence []byte) (Summary, error) {
	q, e := &attestv1.AzureAsk{}, &attestv1.AzureEvidence{}
	if err := errors.Join(unmarshal(ask, q), unmarshal(evidence, e)); err != nil {
		return nil, err
	}
	out := azureSummary{PCRs: map[string]string{}}
	var err error
	if out.VM, err = azure.Summarize(e.GetHclReport()); err != nil {
		return nil, err
	}
	r, err := azure.Parse(e.GetHclReport())
	if err != nil {
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

// azureClaims are what Azure's evidence says, unverified.
func azureClaims(ask, evidence []byte) ([]attestation.Claims, error) {
	q, e := &attestv1.AzureAsk{}, &attestv1.AzureEvidence{}
	if err := errors.Join(unmarshal(ask, q), unmarshal(evidence, e)); err != nil {
		return nil, err
	}
	r, err := azure.Parse(e.GetHclReport())
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

func summarizeSVSM(offer, ask, evidence []byte) (Summary, error) {
	o, a, e := &attestv1.SVSMOffer{}, &attestv1.SVSMAsk{}, &attestv1.SVSMEvidence{}
	for _, m := range []struct {
		data []byte
		to   proto.Message
	}{{offer, o}, {ask, a}, {evidence, e}} {
		if err := unmarshal(m.data, m.to); err != nil {
			return nil, err
		}
	}
	hw, err := snp.Summarize(e.GetSnp())
	if err != nil {
		return nil, err
	}
	var inner [3][]byte
	for n, m := range []proto.Message{o.GetTpm(), a.GetTpm(), e.GetTpm()} {
		if inner[n], err = proto.Marshal(m); err != nil {
			return nil, err
		}
	}
	vtpm, err := tpm.Summarize(inner[0], inner[1], inner[2])
	return both{hw, vtpm}, err
}

func unmarshal(data []byte, to proto.Message) error {
	if err := proto.Unmarshal(data, to); err != nil {
		return fmt.Errorf("%w: %w", attestation.ErrRefused, err)
	}
	return nil
}

// parts returns one exchange of a file that saved.Check accepts.
func parts(s *attestv1.Saved, kind attestation.Kind) (offer, ask, evidence []byte, err error) {
	for n, i := range s.GetItems() {
		if i.GetKind() == string(kind) && n < len(s.GetOffers()) && n < len(s.GetAsks()) {
			return s.GetOffers()[n].GetData(), s.GetAsks()[n].GetData(), i.GetData(), nil
		}
	}
	return nil, nil, nil, fmt.Errorf("%w: no %s evidence in the file", attestation.ErrRefused, kind)
}

// Claims returns what a file's evidence says of hardware, not verified: for
// reference values of a machine that is trusted for another reason.
func Claims(s *attestv1.Saved, kind attestation.Kind) ([]attestation.Claims, error) {
	offer, ask, evidence, err := parts(s, kind)
	if err != nil {
		return nil, err
	}
	switch kind {
	case attestation.TPM:
		c, err := tpm.UnverifiedClaims(offer, ask, evidence)
		return []attestation.Claims{c}, err
	case attestation.SNP:
		e := &attestv1.SNPEvidence{}
		if err := unmarshal(evidence, e); err != nil {
			return nil, err
		}
		return snpClaims(e, "")
	case attestation.TDX:
		e := &attestv1.TDXEvidence{}
		if err := unmarshal(evidence, e); err != nil {
			return nil, err
		}
		return tdxClaims(e, "")
	case attestation.Nitro:
		c, err := nitroClaims(evidence)
		return []attestation.Claims{c}, err
	case attestation.Azure:
		return azureClaims(ask, evidence)
	case attestation.SVSM:
		e := &attestv1.SVSMEvidence{}
		if err := unmarshal(evidence, e); err != nil {
			return nil, err
		}
		a := &attestv1.SVSMAsk{}
		if err := unmarshal(ask, a); err != nil {
			return nil, err
		}
		vtpm, err := tpm.UnverifiedQuote(nil, a.GetTpm().GetPcrs(), e.GetTpm())
		if err != nil {
			return nil, err
		}
		vtpm.Trust = string(attestation.SVSM)
		claims, err := snpClaims(e.GetSnp(), attestation.SVSM)
		return append(claims, attestation.Claims{Kind: attestation.SVSM}, vtpm), err
	}
	return nil, nil
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

func tdxClaims(e *attestv1.TDXEvidence, via attestation.Kind) ([]attestation.Claims, error) {
	c, err := tdx.UnverifiedClaims(e)
	c.Via = via
	return []attestation.Claims{c}, err
}

// EndorsementRequests returns what a verifier of a file's evidence has to have
// from vendors, for fetching it beforehand. product is that of an SNP report of
// version 2, which does not name it.
func EndorsementRequests(s *attestv1.Saved, product string) ([]endorsement.Request, error) {
	var all []endorsement.Request
	for _, i := range s.GetItems() {
		var requests []endorsement.Request
		var err error
		switch attestation.Kind(i.GetKind()) {
		case attestation.SNP:
			e := &attestv1.SNPEvidence{}
			if err = unmarshal(i.GetData(), e); err == nil {
				requests, err = snp.EndorsementRequests(e.GetReport(), product)
			}
		case attestation.SVSM:
			e := &attestv1.SVSMEvidence{}
			if err = unmarshal(i.GetData(), e); err == nil {
				requests, err = snp.EndorsementRequests(e.GetSnp().GetReport(), product)
			}
		case attestation.TDX:
			e := &attestv1.TDXEvidence{}
			if err = unmarshal(i.GetData(), e); err == nil {
				requests, err = tdx.EndorsementRequests(e.GetQuote())
			}
		case attestation.Azure:
			requests, err = azureRequests(i.GetData(), product)
		}
		if err != nil {
			return nil, err
		}
		all = append(all, requests...)
	}
	return all, nil
}

func azureRequests(evidence []byte, product string) ([]endorsement.Request, error) {
	e := &attestv1.AzureEvidence{}
	if err := unmarshal(evidence, e); err != nil {
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
}
