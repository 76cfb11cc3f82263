package azure

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tdx"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/wire"
)

// IssuerOptions configure [NewIssuer]. Unset fields take the stated default.
type IssuerOptions struct {
	// Device is passed to tpm.OpenDevice. Default tpm.DefaultDevice.
	Device string
	// EventLog is the path of the event log. Default tpm.DefaultEventLog.
	EventLog string
	// IMDS is the address of the metadata service. Default [DefaultIMDS].
	IMDS string
	// Endorsements has revocation lists and Intel's collateral. Nil: none is
	// carried, and the verifier must get them.
	Endorsements endorsement.Source
	// Token gets a token of Microsoft Attestation over a nonce; package maa has
	// one. Nil: never.
	Token func(ctx context.Context, nonce []byte) (string, error)
	// Log is told what is left out of evidence and why. Nil: nobody is.
	Log func(what string, err error)
}

// Issuer makes evidence on a confidential VM of Azure.
type Issuer struct {
	opts IssuerOptions
	tpm  tpm.Platform
	imds *imds
}

var _ attestation.Issuer = (*Issuer)(nil)

// NewIssuer returns an issuer. It does not touch the TPM.
func NewIssuer(opts IssuerOptions) (*Issuer, error) {
	if opts.Log == nil {
		opts.Log = func(string, error) {}
	}
	service, err := newIMDS(opts.IMDS)
	if err != nil {
		return nil, err
	}
	return &Issuer{opts, tpm.Platform{Device: opts.Device, AK: akHandle, EventLog: opts.EventLog}, service}, nil
}

// Detect says which hardware is below: attestation.SNP or attestation.TDX. A
// machine that is no confidential VM of Azure gives an error that wraps
// [attestation.ErrNoDevice].
func Detect(opts IssuerOptions) (attestation.Kind, error) {
	i, err := NewIssuer(opts)
	if err != nil {
		return "", err
	}
	_, r, err := i.report()
	if err != nil {
		return "", err
	}
	return r.Isolation, nil
}

// Kind implements attestation.Issuer.
func (*Issuer) Kind() attestation.Kind { return attestation.Azure }

// report reads what the HCL left in NV memory.
func (i *Issuer) report() ([]byte, *Report, error) {
	raw, err := i.tpm.ReadNV(nvReport)
	if err != nil {
		return nil, nil, err
	}
	if raw == nil {
		return nil, nil, fmt.Errorf("%w: the TPM has no report of Azure's at NV index %#x", attestation.ErrNoDevice, nvReport)
	}
	r, err := Parse(raw)
	if err != nil {
		return nil, nil, fmt.Errorf("the machine's own report: %v", err)
	}
	return raw, r, nil
}

// Begin implements attestation.Issuer.
func (i *Issuer) Begin(ctx context.Context) (attestation.Attempt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if _, _, err := i.report(); err != nil {
		return nil, err
	}
	return attempt{i}, nil
}

type attempt struct{ *Issuer }

// Offer implements attestation.Attempt: there is nothing to say before the ask.
func (attempt) Offer() []byte { return nil }

// Close implements attestation.Attempt.
func (attempt) Close() error { return nil }

// SelfAsk returns what a verifier would ask, for evidence in a file.
func (attempt) SelfAsk(pcrs []uint32) (ask, secret []byte, err error) {
	ask, err = proto.Marshal(&attestv1.AzureAsk{Pcrs: pcrs, WantEventLog: true})
	return ask, nil, err
}

// Evidence implements attestation.Attempt. Endorsements and a token that are not
// to be had are left out: the verifier may have them, or do without.
func (a attempt) Evidence(ctx context.Context, ask []byte, binder attestation.Binder) ([]byte, error) {
	var q attestv1.AzureAsk
	if err := wire.Unmarshal(ask, &q); err != nil {
		return nil, fmt.Errorf("verifier's question: %w", err)
	}
	ev := &attestv1.AzureEvidence{}
	var r *Report
	var err error
	if ev.Quote, ev.AkPublic, err = a.tpm.Quote(ctx, q.GetPcrs(), binder, q.GetWantEventLog()); err != nil {
		return nil, err
	}
	if ev.HclReport, r, err = a.report(); err != nil {
		return nil, err
	}
	if !r.coversRuntime() {
		return nil, errors.New("the machine's own report covers other runtime data (hint: was NV memory written while it was read?)")
	}
	if r.Isolation == attestation.SNP {
		ev.Snp = a.endorseSNP(ctx, r)
	} else if ev.Tdx, err = a.quoteTD(ctx, r); err != nil {
		return nil, err
	}
	if q.GetWantToken() && a.opts.Token != nil {
		nonce := sha256.Sum256(binder[:])
		if ev.Token, err = a.opts.Token(ctx, nonce[:]); err != nil {
			a.opts.Log("token of Microsoft Attestation", err)
			ev.Token = ""
		}
	}
	return proto.Marshal(ev)
}

// endorseSNP gets the chip's certificate from the host, or else from AMD, and the
// revocation list from AMD.
func (i *Issuer) endorseSNP(ctx context.Context, r *Report) *attestv1.SNPEvidence {
	ev := &attestv1.SNPEvidence{}
	der, product, err := i.imds.certificate(ctx)
	if err != nil {
		i.opts.Log("certificate of the chip from the host", err)
	}
	ev.Certificate = der
	if i.opts.Endorsements == nil {
		return ev
	}
	requests, err := snp.EndorsementRequests(r.Hardware, product)
	if err != nil {
		i.opts.Log("endorsements of the chip", err)
		return ev
	}
	for n, to := range []*[]byte{&ev.Crl, &ev.Certificate} {
		if n >= len(requests) || len(*to) > 0 {
			continue
		}
		d, err := i.opts.Endorsements.Get(ctx, requests[n])
		if err != nil {
			i.opts.Log("endorsements of the chip", err)
			continue
		}
		*to = d.Body
	}
	return ev
}

// quoteTD has the host make a quote of the TD report, and adds Intel's collateral.
func (i *Issuer) quoteTD(ctx context.Context, r *Report) (*attestv1.TDXEvidence, error) {
	quote, err := i.imds.quote(ctx, r.Hardware)
	if err != nil {
		return nil, err
	}
	ev := &attestv1.TDXEvidence{Quote: quote}
	if i.opts.Endorsements != nil {
		if ev.Collateral, err = tdx.Endorse(ctx, i.opts.Endorsements, quote); err != nil {
			i.opts.Log("tdx collateral", err)
		}
	}
	return ev, nil
}
