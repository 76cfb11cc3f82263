package azure

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tdx"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/wire"
)

// VerifierOptions configure [NewVerifier].
type VerifierOptions struct {
	// SNP and TDX verify the hardware's report. Nil: that hardware is refused. At
	// least one is required.
	SNP *snp.Verifier
	TDX *tdx.Verifier
	// PCRs to ask for, ascending, at least one. Asked at the start of each
	// exchange. Required.
	PCRs func() []uint32
	// Token says whose tokens of Microsoft Attestation are believed. It is asked at
	// the start of each exchange, so that a reloaded policy takes effect. Without
	// it, or if it returns nil, none is asked for, and one that comes counts for
	// nothing.
	Token func() *TokenOptions
	// Now is the clock for tokens. Default time.Now.
	Now func() time.Time
}

// Verifier checks evidence of confidential VMs of Azure.
type Verifier struct {
	opts VerifierOptions
}

var _ attestation.Verifier = (*Verifier)(nil)

// NewVerifier returns a verifier.
func NewVerifier(opts VerifierOptions) (*Verifier, error) {
	if opts.SNP == nil && opts.TDX == nil || opts.PCRs == nil {
		return nil, fmt.Errorf("%w: no hardware, or no PCRs", ErrConfiguration)
	}
	if opts.Token == nil {
		opts.Token = func() *TokenOptions { return nil }
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	return &Verifier{opts}, nil
}

// Kind implements attestation.Verifier.
func (*Verifier) Kind() attestation.Kind { return attestation.Azure }

// Begin implements attestation.Verifier.
func (v *Verifier) Begin(_ context.Context, offer []byte) (attestation.Question, error) {
	return v.begin(offer, v.opts.PCRs())
}

// Restore answers for an exchange that was saved in a file, with the PCRs that it
// asked for.
func (v *Verifier) Restore(_ context.Context, offer, ask, _ []byte) (attestation.Question, error) {
	var q attestv1.AzureAsk
	if err := wire.Unmarshal(ask, &q); err != nil || checkPCRs(q.GetPcrs()) != nil {
		return nil, fmt.Errorf("%w: question", ErrMalformed)
	}
	return v.begin(offer, q.GetPcrs())
}

func (v *Verifier) begin(offer []byte, pcrs []uint32) (attestation.Question, error) {
	if err := checkPCRs(pcrs); err != nil {
		return nil, err
	}
	if len(offer) > 0 {
		return nil, fmt.Errorf("%w: offer of %d bytes", ErrMalformed, len(offer))
	}
	token := v.opts.Token()
	if token != nil && (token.Issuer == "" || token.JWKS == nil) {
		return nil, fmt.Errorf("%w: tokens of nobody, or without keys", ErrConfiguration)
	}
	ask, err := proto.Marshal(&attestv1.AzureAsk{Pcrs: pcrs, WantEventLog: true, WantToken: token != nil})
	return &question{v, token, pcrs, ask}, err
}

func checkPCRs(pcrs []uint32) error {
	for i, p := range pcrs {
		if p > 23 || i > 0 && p <= pcrs[i-1] {
			return fmt.Errorf("%w: PCRs %v are not ascending and below 24", ErrConfiguration, pcrs)
		}
	}
	if len(pcrs) == 0 {
		return fmt.Errorf("%w: no PCRs to ask for", ErrConfiguration)
	}
	return nil
}

type question struct {
	v     *Verifier
	token *TokenOptions
	pcrs  []uint32
	ask   []byte
}

// Ask implements attestation.Question.
func (q *question) Ask() []byte { return q.ask }

// Verify implements attestation.Question: the hardware's report, which covers the
// attestation key, the quote by that key, and the token.
func (q *question) Verify(ctx context.Context, evidence []byte, binder attestation.Binder) ([]attestation.Claims, error) {
	var e attestv1.AzureEvidence
	if err := wire.Unmarshal(evidence, &e); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	r, err := Parse(e.GetHclReport())
	if err != nil {
		return nil, err
	}
	hw, err := q.v.verifyHardware(ctx, r, &e)
	if err != nil {
		return nil, err
	}
	vtpm, err := q.verifyTPM(r, &e, binder)
	if err != nil {
		return nil, err
	}
	c := r.Claims()
	c.Trust, c.Epoch, c.EvidenceDigest = hw.Trust, vtpm.Epoch, sha256.Sum256(evidence)
	if q.token != nil && e.GetToken() != "" {
		if err := q.token.verify(ctx, e.GetToken(), r, binder, q.v.opts.Now(), c.Facts); err != nil {
			return nil, err
		}
	}
	hw.Via, vtpm.Via, vtpm.Trust = attestation.Azure, attestation.Azure, string(attestation.Azure)
	return []attestation.Claims{c, hw, vtpm}, nil
}

// verifyHardware verifies the report that covers the runtime data. Evidence of the
// other hardware beside it is refused, since nothing would look at it.
func (v *Verifier) verifyHardware(ctx context.Context, r *Report, e *attestv1.AzureEvidence) (attestation.Claims, error) {
	var none attestation.Claims
	switch {
	case r.Isolation == attestation.SNP && v.opts.SNP != nil:
		if e.GetTdx() != nil || len(e.GetSnp().GetReport()) > 0 {
			return none, fmt.Errorf("%w: a second hardware report", ErrMalformed)
		}
		c, err := v.opts.SNP.VerifyReport(ctx, &attestv1.SNPEvidence{
			Report: r.Hardware, Certificate: e.GetSnp().GetCertificate(), Crl: e.GetSnp().GetCrl(),
		}, r.ReportData)
		if errors.Is(err, snp.ErrConfiguration) {
			return none, fmt.Errorf("%w: %w", ErrHardware, err)
		}
		if err != nil {
			return none, err
		}
		// The HCL runs at VMPL 0. From another level the guest itself could ask,
		// with runtime data of its own making.
		if vmpl, ok := facts.SNPVMPL.Of(c); !ok || vmpl != 0 {
			return none, fmt.Errorf("%w: it is of VMPL %v", ErrVMPL, vmpl)
		}
		return c, nil
	case r.Isolation == attestation.TDX && v.opts.TDX != nil:
		if e.GetSnp() != nil || len(e.GetTdx().GetEventLog()) > 0 || !r.coversRuntime() {
			return none, fmt.Errorf("%w: a second hardware report, or one of something else", ErrMalformed)
		}
		c, err := v.opts.TDX.VerifyQuote(ctx, e.GetTdx(), r.ReportData)
		if errors.Is(err, tdx.ErrConfiguration) {
			return none, fmt.Errorf("%w: %w", ErrHardware, err)
		}
		return c, err
	}
	return none, fmt.Errorf("%w: %s", ErrHardware, r.Isolation)
}

// verifyTPM demands that the quote is by the key of the covered runtime data.
func (q *question) verifyTPM(r *Report, e *attestv1.AzureEvidence, binder attestation.Binder) (attestation.Claims, error) {
	var none attestation.Claims
	ak, err := tpm.ParseAK(e.GetAkPublic())
	if err != nil {
		return none, err
	}
	if key, ok := ak.Key.(*rsa.PublicKey); !ok || !key.Equal(r.AK) {
		return none, ErrKey
	}
	if len(e.GetQuote().GetCredentialProof()) > 0 {
		return none, fmt.Errorf("%w: a credential proof, where no credential is", ErrMalformed)
	}
	quoted, err := tpm.VerifyQuote(e.GetQuote(), ak.Key, binder, q.pcrs)
	if err != nil {
		return none, err
	}
	id, err := tpm.EKDigest(ak.Key)
	if err != nil {
		return none, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	facts.TPMAK.Put(quoted.Facts, id)
	return attestation.Claims{
		Kind: attestation.TPM, Identity: id, Measurements: quoted.Measurements, Epoch: quoted.Epoch, Facts: quoted.Facts,
	}, nil
}
