package kinds

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/azure"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tdx"
)

// Import makes a file of evidence from an SNP report or a TDX quote as other tools
// save them: the bytes or their hex, and of Azure the report of its HCL with an SNP
// report in it. What it covers is taken from itself, so that it proves no freshness;
// endorsements have to come from elsewhere.
func Import(data []byte) (*attestv1.Saved, error) {
	data = unhex(data)
	if bytes.HasPrefix(data, []byte("HCLA")) {
		hcl, err := azure.Parse(data)
		switch {
		case err != nil:
			return nil, fmt.Errorf("as a report of Azure's HCL: %w", err)
		case hcl.Isolation != attestation.SNP:
			return nil, errors.New("it is a report of Azure's HCL with a TD report in it, which its own machine alone can make a quote of")
		}
		data = hcl.Hardware
	}
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

// unhex undoes hex, with or without 0x in front and with line breaks, if that is what
// data is.
func unhex(data []byte) []byte {
	text := bytes.Join(bytes.Fields(data), nil)
	text = bytes.TrimPrefix(text, []byte("0x"))
	out := make([]byte, hex.DecodedLen(len(text)))
	if _, err := hex.Decode(out, text); err != nil {
		return data
	}
	return out
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
