package tpm

import (
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation/certificate"
	"github.com/keyagent/keyagent/attestation/facts"
)

// Summary is what a file of evidence says, for people. None of it is verified.
type Summary struct {
	EK            string            `json:"ek,omitempty"` // as an operator enrols it
	EKCertificate string            `json:"ek_certificate_issuer,omitempty"`
	AKCertificate string            `json:"ak_certificate_issuer,omitempty"`
	Instance      string            `json:"instance,omitempty"` // that the AK's certificate names
	AKName        string            `json:"ak_name"`
	PCRs          map[uint32]string `json:"pcrs"`
	EventLogBytes int               `json:"event_log_bytes"`
	// Unexplained says of registers why the event log does not lead to them.
	Unexplained map[uint32]string `json:"unexplained,omitempty"`
}

// Summarize reads one exchange without verifying it.
func Summarize(offer, asked, evidence []byte) (*Summary, error) {
	o, err := parseOffer(offer)
	if err != nil {
		return nil, err
	}
	out := &Summary{AKName: hex.EncodeToString(o.ak.Name), PCRs: map[uint32]string{}}
	if o.ek != nil {
		hw, err := nameEK(o)
		if err != nil {
			return nil, err
		}
		out.EK = hw.identity
	}
	if cert, err := certificate.Parse(o.certificate); err == nil {
		out.EKCertificate = cert.Issuer.String()
	}
	if cert, err := certificate.Parse(o.akCertificate); err == nil {
		out.AKCertificate = cert.Issuer.String()
		set := map[string]any{}
		if instanceFacts(cert, set) == nil && len(set) > 0 {
			out.Instance = fmt.Sprintf("%v/%v/%v", set[string(facts.GCEProjectID)], set[string(facts.GCEZone)], set[string(facts.GCEInstanceName)])
		}
	}
	var ask attestv1.TPMAsk
	var ev attestv1.TPMEvidence
	if proto.Unmarshal(asked, &ask) != nil || proto.Unmarshal(evidence, &ev) != nil ||
		len(ask.GetPcrs()) != len(ev.GetPcrValues()) {
		return nil, fmt.Errorf("%w: question and answer do not belong together", ErrMalformed)
	}
	values := map[uint32][]byte{}
	for i, pcr := range ask.GetPcrs() {
		values[pcr] = ev.GetPcrValues()[i]
		out.PCRs[pcr] = hex.EncodeToString(values[pcr])
	}
	out.EventLogBytes = len(ev.GetEventLog())
	all, err := explain(values, ev.GetEventLog(), ev.GetUserspaceLog())
	if err != nil {
		return nil, err
	}
	for pcr := range values {
		if why := all[register(pcr)].Unexplained; why != "" {
			if out.Unexplained == nil {
				out.Unexplained = map[uint32]string{}
			}
			out.Unexplained[pcr] = why
		}
	}
	return out, nil
}

// Print writes the summary for a person.
func (s *Summary) Print(w io.Writer) {
	if s.EK != "" {
		fmt.Fprintf(w, "endorsement key  %s\n", s.EK)
		if s.EKCertificate != "" {
			fmt.Fprintf(w, "  certified by   %s\n", s.EKCertificate)
		} else {
			fmt.Fprintf(w, "  no certificate: an operator must enrol it\n")
		}
	}
	fmt.Fprintf(w, "attestation key  %s\n", s.AKName)
	if s.AKCertificate != "" {
		fmt.Fprintf(w, "  certified by   %s\n", s.AKCertificate)
	}
	if s.Instance != "" {
		fmt.Fprintf(w, "  of instance    %s\n", s.Instance)
	}
	for _, pcr := range slices.Sorted(maps.Keys(s.PCRs)) {
		fmt.Fprintf(w, "pcr %-2d           %s\n", pcr, s.PCRs[pcr])
	}
	fmt.Fprintf(w, "event log        %d bytes\n", s.EventLogBytes)
	for _, pcr := range slices.Sorted(maps.Keys(s.Unexplained)) {
		fmt.Fprintf(w, "  not pcr %-2d     %s\n", pcr, s.Unexplained[pcr])
	}
}
