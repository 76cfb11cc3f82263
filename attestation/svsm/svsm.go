// Package svsm attests a machine whose vTPM runs in a secure VM service module
// (SVSM) below the guest, at VMPL 0 of SEV-SNP.
//
// # What the evidence is
//
// One SNP report that the SVSM asked for, over the binder and the manifest of its
// vTPM service, which is the vTPM's endorsement key; and a quote of that vTPM
// over the same binder. The report says which SVSM runs, the manifest ties the
// vTPM to it, and credential activation ties the quote's key to the vTPM.
//
// # What the verifier never does
//
// It never accepts a report of another VMPL than 0: the guest itself could ask
// for one, with a manifest of its own making. The format is specified in
// docs/spec/svsm-evidence.md.
package svsm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/wire"
)

// serviceVTPM is the GUID of the vTPM service in the attestation protocol.
const serviceVTPM = "c476f1eb-0123-45a5-9641-b4e7dde5bfe3"

// maxManifest bounds a manifest in bytes: one public key.
const maxManifest = 1 << 10

// Each refusal has its own error; all wrap [attestation.ErrRefused].
var (
	ErrMalformed = refusal("malformed SVSM evidence")
	ErrVMPL      = refusal("report is not the SVSM's own")
	ErrManifest  = refusal("endorsement key is not the one that the SVSM vouches for")
)

// ErrConfiguration means that an issuer or verifier lacks a part.
var ErrConfiguration = errors.New("svsm attestation is not configured")

func refusal(text string) error { return fmt.Errorf("%w: %s", attestation.ErrRefused, text) }

// Issuer makes evidence on a machine with an SVSM.
type Issuer struct {
	snp *snp.Issuer
	tpm *tpm.Issuer
}

// NewIssuer returns an issuer. Both parts are required; the TPM's has an
// attestation key of its own.
func NewIssuer(s *snp.Issuer, t *tpm.Issuer) (*Issuer, error) {
	if s == nil || t == nil {
		return nil, ErrConfiguration
	}
	return &Issuer{s, t}, nil
}

// Detect asks the SVSM for a report over nothing in particular. An error wraps
// [attestation.ErrNoDevice].
func Detect(ctx context.Context, s *snp.Issuer) error {
	_, _, err := s.CollectService(ctx, [64]byte{}, serviceVTPM)
	return err
}

// Kind implements attestation.Issuer.
func (*Issuer) Kind() attestation.Kind { return attestation.SVSM }

// Begin implements attestation.Issuer.
func (i *Issuer) Begin(ctx context.Context) (attestation.Attempt, error) {
	t, err := i.tpm.Begin(ctx)
	if err != nil {
		return nil, err
	}
	offer, err := bareOffer(t.Offer())
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return &attempt{i, t, offer}, nil
}

// bareOffer leaves out certificates: nobody but the SVSM vouches here.
func bareOffer(full []byte) ([]byte, error) {
	o := &attestv1.TPMOffer{}
	if err := wire.Unmarshal(full, o); err != nil {
		return nil, err
	}
	o.EkCertificate, o.EkIntermediates = nil, nil
	return proto.Marshal(&attestv1.SVSMOffer{Tpm: o})
}

type attempt struct {
	issuer *Issuer
	tpm    attestation.Attempt
	offer  []byte
}

// Offer implements attestation.Attempt.
func (a *attempt) Offer() []byte { return a.offer }

// Close implements attestation.Attempt.
func (a *attempt) Close() error { return a.tpm.Close() }

// Evidence implements attestation.Attempt.
func (a *attempt) Evidence(ctx context.Context, ask []byte, binder attestation.Binder) ([]byte, error) {
	q := &attestv1.SVSMAsk{}
	if err := wire.Unmarshal(ask, q); err != nil {
		return nil, fmt.Errorf("verifier's question: %w", err)
	}
	inner, err := proto.Marshal(q.GetTpm())
	if err != nil {
		return nil, err
	}
	quote, err := a.tpm.Evidence(ctx, inner, binder)
	if err != nil {
		return nil, err
	}
	e := &attestv1.SVSMEvidence{Tpm: &attestv1.TPMEvidence{}}
	if err := wire.Unmarshal(quote, e.Tpm); err != nil {
		return nil, err
	}
	if e.Snp, e.Manifest, err = a.issuer.snp.CollectService(ctx, binder, serviceVTPM); err != nil {
		return nil, err
	}
	return proto.Marshal(e)
}

// SelfAsk returns what a verifier would ask, for evidence in a file.
func (a *attempt) SelfAsk(pcrs []uint32) (ask, secret []byte, err error) {
	asker, ok := a.tpm.(interface {
		SelfAsk([]uint32) ([]byte, []byte, error)
	})
	if !ok {
		return nil, nil, ErrConfiguration
	}
	inner, secret, err := asker.SelfAsk(pcrs)
	if err != nil {
		return nil, nil, err
	}
	ask, err = wrapAsk(inner)
	return ask, secret, err
}

func wrapAsk(inner []byte) ([]byte, error) {
	t := &attestv1.TPMAsk{}
	if err := wire.Unmarshal(inner, t); err != nil {
		return nil, err
	}
	return proto.Marshal(&attestv1.SVSMAsk{Tpm: t})
}

// Verifier checks SVSM evidence.
type Verifier struct {
	snp  *snp.Verifier
	pcrs func() []uint32
}

// NewVerifier returns a verifier that asks for the PCRs that pcrs returns,
// ascending and at least one. Both are required.
func NewVerifier(s *snp.Verifier, pcrs func() []uint32) (*Verifier, error) {
	if s == nil || pcrs == nil {
		return nil, ErrConfiguration
	}
	return &Verifier{s, pcrs}, nil
}

// Kind implements attestation.Verifier.
func (*Verifier) Kind() attestation.Kind { return attestation.SVSM }

// Begin implements attestation.Verifier.
func (v *Verifier) Begin(_ context.Context, offer []byte) (attestation.Question, error) {
	inner, err := innerOffer(offer)
	if err != nil {
		return nil, err
	}
	u, err := tpm.BeginUnvouched(inner, v.pcrs())
	if err != nil {
		return nil, err
	}
	return v.question(u)
}

// Restore answers for an exchange that was saved in a file.
func (v *Verifier) Restore(_ context.Context, offer, ask, secret []byte) (attestation.Question, error) {
	inner, err := innerOffer(offer)
	if err != nil {
		return nil, err
	}
	asked := &attestv1.SVSMAsk{}
	if err := wire.Unmarshal(ask, asked); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	u, err := tpm.RestoreUnvouched(inner, asked.GetTpm().GetPcrs(), secret)
	if err != nil {
		return nil, err
	}
	return v.question(u)
}

func innerOffer(offer []byte) ([]byte, error) {
	o := &attestv1.SVSMOffer{}
	if err := wire.Unmarshal(offer, o); err != nil {
		return nil, fmt.Errorf("%w: offer: %w", ErrMalformed, err)
	}
	return proto.Marshal(o.GetTpm())
}

func (v *Verifier) question(u *tpm.Unvouched) (attestation.Question, error) {
	ask, err := wrapAsk(u.Ask())
	return &question{v, u, ask}, err
}

type question struct {
	v   *Verifier
	tpm *tpm.Unvouched
	ask []byte
}

// Ask implements attestation.Question.
func (q *question) Ask() []byte { return q.ask }

// Verify implements attestation.Question.
func (q *question) Verify(ctx context.Context, evidence []byte, binder attestation.Binder) ([]attestation.Claims, error) {
	e := &attestv1.SVSMEvidence{}
	if err := wire.Unmarshal(evidence, e); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if len(e.GetManifest()) == 0 || len(e.GetManifest()) > maxManifest {
		return nil, fmt.Errorf("%w: manifest of %d bytes", ErrMalformed, len(e.GetManifest()))
	}
	hw, err := q.v.snp.VerifyReport(ctx, e.GetSnp(), snp.ServiceReportData(binder, e.GetManifest()))
	if err != nil {
		return nil, err
	}
	if vmpl, ok := facts.SNPVMPL.Of(hw); !ok || vmpl != 0 {
		return nil, fmt.Errorf("%w: it is of VMPL %v", ErrVMPL, vmpl)
	}
	if !bytes.Equal(e.GetManifest(), q.tpm.EKPublic) {
		return nil, ErrManifest
	}
	quote, err := proto.Marshal(e.GetTpm())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	vtpm, err := q.tpm.Verify(ctx, quote, binder)
	if err != nil {
		return nil, err
	}
	hw.Via, vtpm.Via, vtpm.Trust = attestation.SVSM, attestation.SVSM, string(attestation.SVSM)
	return []attestation.Claims{
		{Kind: attestation.SVSM, Identity: vtpm.Identity, Trust: hw.Trust, Epoch: hw.Epoch,
			Facts: map[string]any{string(facts.TPMEK): vtpm.Identity}, EvidenceDigest: sha256.Sum256(evidence)},
		hw, vtpm,
	}, nil
}
