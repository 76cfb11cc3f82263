package kinds

import (
	"context"
	"errors"
	"io"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/svsm"
	"github.com/keyagent/keyagent/attestation/tpm"
)

func svsmKind() Kind {
	return Kind{
		Kind: ofPolicy(attestation.SVSM),
		Detect: func(ctx context.Context, o IssuerOptions) (string, error) {
			s, err := snp.NewIssuer(o.snp())
			if err != nil {
				return "", err
			}
			return "an SVSM answers through configfs-tsm", svsm.Detect(ctx, s)
		},
		Issuer: newSVSM,
		Verifier: func(v *Maker) (attestation.Verifier, error) {
			s, err := carried[*snp.Verifier](v, attestation.SNP)
			if err != nil {
				return nil, err
			}
			return svsm.NewVerifier(s, v.pcrs)
		},
		Summarize: summarizeSVSM,
		Claims: func(x Exchange) ([]attestation.Claims, error) {
			e, err := decode[attestv1.SVSMEvidence](x.Evidence)
			if err != nil {
				return nil, err
			}
			a, err := decode[attestv1.SVSMAsk](x.Ask)
			if err != nil {
				return nil, err
			}
			vtpm, err := tpm.UnverifiedQuote(nil, a.GetTpm().GetPcrs(), e.GetTpm())
			if err != nil {
				return nil, err
			}
			vtpm.Trust, vtpm.Via = string(attestation.SVSM), attestation.SVSM
			claims, err := snpClaims(e.GetSnp(), attestation.SVSM)
			return append(claims, attestation.Claims{Kind: attestation.SVSM}, vtpm), err
		},
		Endorsements: func(evidence []byte, product string) ([]endorsement.Request, error) {
			e, err := decode[attestv1.SVSMEvidence](evidence)
			if err != nil {
				return nil, err
			}
			return snp.EndorsementRequests(e.GetSnp().GetReport(), product)
		},
	}
}

func newSVSM(o IssuerOptions) (attestation.Issuer, error) {
	// The TPM of an SVSM has an RSA key by that specification, and no certificate
	// that would say which of its keys is meant.
	t := o.tpm()
	t.AK = tpm.AKOwn
	if t.EK == "" || t.EK == tpm.EKAuto {
		t.EK = tpm.EKRSA2048
	}
	si, err := snp.NewIssuer(o.snp())
	if err != nil {
		return nil, err
	}
	ti, err := tpm.NewIssuer(t)
	if err != nil {
		return nil, err
	}
	return svsm.NewIssuer(si, ti)
}

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

func summarizeSVSM(x Exchange) (Summary, error) {
	o, err1 := decode[attestv1.SVSMOffer](x.Offer)
	a, err2 := decode[attestv1.SVSMAsk](x.Ask)
	e, err3 := decode[attestv1.SVSMEvidence](x.Evidence)
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
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
