package kinds

import (
	"bytes"
	"fmt"

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
	var tdxErr error
	for _, quote := range unpadded(data) {
		q, err := tdx.Parse(quote)
		if err != nil {
			tdxErr = err
			continue
		}
		e, err := proto.Marshal(&attestv1.TDXEvidence{Quote: quote})
		return saved.Of(attestation.TDX, e, q.ReportData), err
	}
	return nil, fmt.Errorf("as a report: %w; as a quote: %w", snpErr, tdxErr)
}

// unpadded are what a quote may be in data: tools save the kernel's buffer, of
// which a quote leaves zeros, and the chain in it may end in a zero of its own.
func unpadded(data []byte) [][]byte {
	end := len(bytes.TrimRight(data, "\x00"))
	all := [][]byte{data, data[:end]}
	if end < len(data) {
		all = append(all, data[:end+1])
	}
	return all
}
