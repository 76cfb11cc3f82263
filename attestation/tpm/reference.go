package tpm

import (
	"crypto/x509"
	"fmt"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// UnverifiedClaims reads what one exchange says, for reference values of a
// machine that is trusted for another reason. Nothing is verified; each value has
// the events of the log that replay to it. The offer may be empty.
func UnverifiedClaims(offer, asked, evidence []byte) (attestation.Claims, error) {
	var ask attestv1.TPMAsk
	var e attestv1.TPMEvidence
	var o attestv1.TPMOffer
	if proto.Unmarshal(asked, &ask) != nil || proto.Unmarshal(evidence, &e) != nil || proto.Unmarshal(offer, &o) != nil {
		return attestation.Claims{}, fmt.Errorf("%w: not an exchange with a TPM", ErrMalformed)
	}
	return UnverifiedQuote(o.GetAkCertificate(), ask.GetPcrs(), &e)
}

// UnverifiedQuote is UnverifiedClaims for a quote by itself. The certificate is
// the attestation key's, if it has one.
func UnverifiedQuote(certificate []byte, pcrs []uint32, e *attestv1.TPMEvidence) (attestation.Claims, error) {
	if err := checkPCRs(pcrs); err != nil {
		return attestation.Claims{}, fmt.Errorf("%w: PCRs %v", ErrMalformed, pcrs)
	}
	if len(pcrs) != len(e.GetPcrValues()) {
		return attestation.Claims{}, fmt.Errorf("%w: %d values for %d PCRs", ErrMalformed, len(e.GetPcrValues()), len(pcrs))
	}
	values := map[uint32][]byte{}
	for i, pcr := range pcrs {
		values[pcr] = e.GetPcrValues()[i]
	}
	measurements, err := explain(values, e.GetEventLog(), e.GetUserspaceLog())
	if err != nil {
		return attestation.Claims{}, err
	}
	set := map[string]any{}
	logFacts(e.GetEventLog(), set)
	if cert, err := x509.ParseCertificate(certificate); err == nil {
		if err := instanceFacts(cert, set); err != nil {
			return attestation.Claims{}, err
		}
	}
	return attestation.Claims{Kind: attestation.TPM, Measurements: measurements, Facts: set}, nil
}
