package snp

import (
	"fmt"
	"io"
	"strings"
	"time"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation/facts"
)

// Summary is what evidence says, for people. None of it is verified.
type Summary struct {
	Product     string   `json:"product"` // empty if neither report nor certificate says
	Version     uint32   `json:"report_version"`
	Signer      string   `json:"signer"`
	ChipID      string   `json:"chip_id"`
	Measurement string   `json:"measurement"`
	HostData    string   `json:"host_data,omitempty"`
	ReportID    string   `json:"report_id"`
	ReportData  string   `json:"report_data"`
	VMPL        uint32   `json:"vmpl"`
	TCB         string   `json:"tcb"`
	Policy      []string `json:"policy"` // the bits that are set
	// Certificate and CRL say until when what is carried is valid, or nothing.
	Certificate string `json:"certificate_until,omitempty"`
	CRL         string `json:"crl_until,omitempty"`
}

// Summarize reads evidence without verifying it.
func Summarize(ev *attestv1.SNPEvidence) (*Summary, error) {
	r, err := Parse(ev.GetReport())
	if err != nil {
		return nil, err
	}
	s := &Summary{
		Product: r.Product, Version: r.Version, Signer: strings.ToLower(r.signer.String()), VMPL: r.VMPL,
		Measurement: fmt.Sprintf("%x", r.Measurement), ReportID: fmt.Sprintf("%x", r.ReportID), ReportData: fmt.Sprintf("%x", r.ReportData),
	}
	if l, err := parseLeaf(ev.GetCertificate(), r.signer); err == nil {
		s.Certificate = l.cert.NotAfter.Format(time.RFC3339)
		if s.Product == "" {
			s.Product = l.product
		}
	}
	if list, err := parseCRL(ev.GetCrl()); err == nil {
		s.CRL = list.NextUpdate.Format(time.RFC3339)
	}
	c := r.claims(s.Product, "")
	s.ChipID, _ = facts.SNPChipID.Of(c)
	s.HostData, _ = facts.SNPHostData.Of(c)
	s.TCB = splitTCB(s.Product, r.ReportedTCB).String()
	for _, bit := range []facts.Fact[bool]{facts.Debug, facts.SNPMigrationAgent, facts.SNPSMTAllowed, facts.SNPSingleSocket, facts.SNPCXLAllowed,
		facts.SNPXTSRequired, facts.SNPRAPLOffRequired, facts.SNPCiphertextHidingRequired, facts.SNPPageSwapDisabled} {
		if set, _ := bit.Of(c); set {
			s.Policy = append(s.Policy, string(bit))
		}
	}
	return s, nil
}

// Print writes the summary for a person.
func (s *Summary) Print(w io.Writer) {
	or := func(text, otherwise string) string {
		if text == "" {
			return otherwise
		}
		return text
	}
	fmt.Fprintf(w, "product       %s, report version %d\n", or(s.Product, "not named"), s.Version)
	fmt.Fprintf(w, "chip          %s\n", or(s.ChipID, "masked"))
	fmt.Fprintf(w, "measurement   %s\n", s.Measurement)
	if s.HostData != "" {
		fmt.Fprintf(w, "host data     %s\n", s.HostData)
	}
	fmt.Fprintf(w, "report ID     %s\n", s.ReportID)
	fmt.Fprintf(w, "report data   %s\n", s.ReportData)
	fmt.Fprintf(w, "reported TCB  %s\n", s.TCB)
	fmt.Fprintf(w, "policy        %s\n", or(strings.Join(s.Policy, ", "), "no bit set"))
	fmt.Fprintf(w, "VMPL          %d\n", s.VMPL)
	fmt.Fprintf(w, "signed by     %s, certificate %s\n", s.Signer, until(s.Certificate))
	fmt.Fprintf(w, "revocations   %s\n", until(s.CRL))
}

func until(date string) string {
	if date == "" {
		return "not carried"
	}
	return "carried, valid until " + date
}
