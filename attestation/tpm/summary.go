package tpm

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
)

// Summary is what a file of evidence says, for people. None of it is verified.
type Summary struct {
	EK            string            `json:"ek"` // as an operator enrols it
	EKCertificate string            `json:"ek_certificate_issuer,omitempty"`
	AKName        string            `json:"ak_name"`
	PCRs          map[uint32]string `json:"pcrs"`
	EventLogBytes int               `json:"event_log_bytes"`
}

// Summarize reads evidence without verifying it.
func Summarize(s *attestv1.Saved) (*Summary, error) {
	if len(s.GetOffers()) != 1 || len(s.GetAsks()) != 1 || len(s.GetItems()) != 1 {
		return nil, fmt.Errorf("%w: not one TPM", ErrMalformed)
	}
	o, err := parseOffer(s.GetOffers()[0].GetData())
	if err != nil {
		return nil, err
	}
	key, err := tpm2.Pub(*o.ek)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	out := &Summary{AKName: hex.EncodeToString(o.akName), PCRs: map[uint32]string{}}
	if out.EK, err = EKDigest(key); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if cert, err := x509.ParseCertificate(o.certificate); err == nil {
		out.EKCertificate = cert.Issuer.String()
	}
	var ask attestv1.TPMAsk
	var ev attestv1.TPMEvidence
	if proto.Unmarshal(s.GetAsks()[0].GetData(), &ask) != nil || proto.Unmarshal(s.GetItems()[0].GetData(), &ev) != nil ||
		len(ask.GetPcrs()) != len(ev.GetPcrValues()) {
		return nil, fmt.Errorf("%w: question and answer do not belong together", ErrMalformed)
	}
	for i, pcr := range ask.GetPcrs() {
		out.PCRs[pcr] = hex.EncodeToString(ev.GetPcrValues()[i])
	}
	out.EventLogBytes = len(ev.GetEventLog())
	return out, nil
}

// Print writes the summary for a person.
func (s *Summary) Print(w io.Writer) {
	fmt.Fprintf(w, "endorsement key  %s\n", s.EK)
	if s.EKCertificate != "" {
		fmt.Fprintf(w, "  certified by   %s\n", s.EKCertificate)
	} else {
		fmt.Fprintf(w, "  no certificate: an operator must enrol it\n")
	}
	fmt.Fprintf(w, "attestation key  %s\n", s.AKName)
	for _, pcr := range slices.Sorted(maps.Keys(s.PCRs)) {
		fmt.Fprintf(w, "pcr %-2d           %s\n", pcr, s.PCRs[pcr])
	}
	fmt.Fprintf(w, "event log        %d bytes\n", s.EventLogBytes)
}
