package snp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/client"
	"github.com/google/go-sev-guest/kds"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/facts"
)

// maxAsking bounds what one exchange waits for endorsements: its verifier may have
// them, and waits as well.
const maxAsking = 15 * time.Second

// IssuerOptions configure [NewIssuer]. Unset fields take the stated default.
type IssuerOptions struct {
	// Endorsements has what the host does not hand over. Nil: evidence carries
	// only what the host does.
	Endorsements endorsement.Source
	// VMPL to ask for. Default the kernel's own.
	VMPL *uint
	// TSM is the kernel's configfs. Default the mounted one.
	TSM configfsi.Client
	// Device is used if configfs has no reports. Default DefaultDevice.
	Device string
	// Log hears of endorsements that evidence goes without. Default nobody.
	Log func(msg string, err error)

	open func() client.Device // stands in for Device's driver, in tests
}

// Issuer makes evidence with the processor of this machine.
type Issuer struct{ opts IssuerOptions }

var _ attestation.Issuer = (*Issuer)(nil)

// NewIssuer returns an issuer. It does not touch the hardware.
func NewIssuer(opts IssuerOptions) (*Issuer, error) {
	if opts.VMPL != nil && *opts.VMPL > 3 {
		return nil, fmt.Errorf("VMPL %d (hint: 0 to 3)", *opts.VMPL)
	}
	if opts.Log == nil {
		opts.Log = func(string, error) {}
	}
	return &Issuer{opts}, nil
}

// Kind implements attestation.Issuer.
func (*Issuer) Kind() attestation.Kind { return attestation.SNP }

// Begin implements attestation.Issuer. An error wraps [attestation.ErrNoDevice] if
// this machine has no SEV-SNP.
func (i *Issuer) Begin(ctx context.Context) (attestation.Attempt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	hw, _, err := i.opts.find()
	if err != nil {
		return nil, err
	}
	return attempt{i, hw}, nil
}

type attempt struct {
	issuer *Issuer
	hw     hardware
}

// Offer implements attestation.Attempt.
func (attempt) Offer() []byte { return nil }

// Close implements attestation.Attempt.
func (attempt) Close() error { return nil }

// Evidence implements attestation.Attempt.
func (a attempt) Evidence(ctx context.Context, ask []byte, binder attestation.Binder) ([]byte, error) {
	if len(ask) > 0 {
		return nil, errors.New("verifier asks for more than an SEV-SNP report")
	}
	ev, err := a.collect(ctx, binder)
	if err != nil {
		return nil, err
	}
	return proto.Marshal(ev)
}

// Collect makes a report over reportData with its endorsements, for evidence in
// which a report vouches for something else than a binder.
func (i *Issuer) Collect(ctx context.Context, reportData [64]byte) (*attestv1.SNPEvidence, error) {
	hw, _, err := i.opts.find()
	if err != nil {
		return nil, err
	}
	return attempt{i, hw}.collect(ctx, reportData)
}

// Identity returns how evidence of this machine names its processor: the SHA-256 of the
// chip's ID, 64 hex digits. Nothing of it is verified here. An error wraps
// [attestation.ErrNoDevice] if this machine has no SEV-SNP. A guest whose host hides the
// chip, or whose reports a provider's key signs (VLEK), is named after its launch, which
// is another one each time: that is an error.
func (i *Issuer) Identity(ctx context.Context) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	hw, _, err := i.opts.find()
	if err != nil {
		return "", err
	}
	raw, _, err := hw.report([64]byte{}, i.opts.VMPL)
	if err != nil {
		return "", fmt.Errorf("SEV-SNP report: %w", err)
	}
	r, err := Parse(raw)
	if err != nil {
		return "", fmt.Errorf("SEV-SNP report of this machine: %w", err)
	}
	c := r.Claims()
	if chip, ok := facts.SNPChipID.Of(c); !ok || chip == "" || r.signer == abi.VlekReportSigner {
		return "", errors.New("the SEV-SNP report of this machine names no chip")
	}
	return c.Identity, nil
}

func (a attempt) collect(ctx context.Context, reportData [64]byte) (*attestv1.SNPEvidence, error) {
	report, table, err := a.hw.report(reportData, a.issuer.opts.VMPL)
	if err != nil {
		return nil, fmt.Errorf("SEV-SNP report: %w", err)
	}
	return a.issuer.wrap(ctx, report, table, reportData)
}

// wrap puts a report of this machine together with its endorsements.
func (i *Issuer) wrap(ctx context.Context, report, table []byte, reportData [64]byte) (*attestv1.SNPEvidence, error) {
	r, err := Parse(report)
	if err != nil {
		return nil, fmt.Errorf("SEV-SNP report of this machine: %w", err)
	}
	if r.ReportData != reportData {
		return nil, errors.New("SEV-SNP report of this machine is over other data than was asked for")
	}
	ev := &attestv1.SNPEvidence{Report: bytes.Clone(report)}
	entries, err := parseTable(table)
	if err != nil {
		i.opts.Log("certificates from the host are ignored", err)
	}
	ev.Certificate = leafOf(entries, r.signer)
	i.endorse(ctx, r, ev)
	return ev, nil
}

// endorse adds what is missing. Nothing of it is fatal here: the verifier may have
// it, and it is the verifier who refuses.
func (i *Issuer) endorse(ctx context.Context, r *Report, ev *attestv1.SNPEvidence) {
	if i.opts.Endorsements == nil {
		return
	}
	product := r.Product
	if product == "" {
		product = i.guess(r, ev.GetCertificate())
	}
	requests, err := EndorsementRequests(ev.GetReport(), product)
	if err != nil {
		i.opts.Log("evidence goes without endorsements", err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, maxAsking)
	defer cancel()
	for n, to := range []*[]byte{&ev.Crl, &ev.Certificate} {
		if n >= len(requests) || len(*to) > 0 {
			continue
		}
		d, err := i.opts.Endorsements.Get(ctx, requests[n])
		if err != nil {
			i.opts.Log("evidence goes without an endorsement", err)
			continue
		}
		*to = d.Body
	}
}

// guess is the product line of a report that does not name it. A wrong one costs
// the endorsements, and nothing else.
func (i *Issuer) guess(r *Report, certificate []byte) string {
	if l, err := parseLeaf(certificate, r.signer); err == nil {
		return l.product
	}
	if runtime.GOARCH != "amd64" {
		return ""
	}
	return kds.ProductLine(abi.SevProduct())
}
