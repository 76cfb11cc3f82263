package setup

import (
	"errors"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tdx"
)

// Import makes a file of evidence from an SNP report or a TDX quote as other
// tools save them. What it covers is taken from itself, so that it proves no
// freshness; endorsements have to come from elsewhere.
func Import(data []byte) (*attestv1.Saved, error) {
	r, snpErr := snp.Parse(data)
	if snpErr == nil {
		e, err := proto.Marshal(&attestv1.SNPEvidence{Report: data})
		return saved.Of(attestation.SNP, e, r.ReportData), err
	}
	q, tdxErr := tdx.Parse(data)
	if tdxErr == nil {
		e, err := proto.Marshal(&attestv1.TDXEvidence{Quote: data})
		return saved.Of(attestation.TDX, e, q.ReportData), err
	}
	return nil, errors.Join(snpErr, tdxErr)
}
