package tpm

import (
	"context"
	"crypto/rand"
	"fmt"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// savedVersion of a file of evidence.
const savedVersion = 1

// Collect makes evidence for a file: the machine asks itself, over a binder that
// it chose. Such a file shows what the machine would prove, and to a verifier
// that trusts how it came about also that it did; it is not fresh.
func Collect(ctx context.Context, i *Issuer, pcrs []uint32) (*attestv1.Saved, error) {
	if err := checkPCRs(pcrs); err != nil {
		return nil, err
	}
	a, err := i.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	o, err := parseOffer(a.Offer())
	if err != nil {
		return nil, err
	}
	var binder attestation.Binder
	credential := make([]byte, 32)
	rand.Read(binder[:])
	rand.Read(credential)
	ask, err := o.ask(pcrs, credential)
	if err != nil {
		return nil, err
	}
	ev, err := a.Evidence(ctx, ask, binder)
	if err != nil {
		return nil, err
	}
	item := func(data []byte) []*attestv1.Item {
		return []*attestv1.Item{{Kind: string(attestation.TPM), Data: data}}
	}
	return &attestv1.Saved{
		Version: savedVersion, Binder: binder[:], Offers: item(a.Offer()), Asks: item(ask), Items: item(ev),
		CredentialSecrets: [][]byte{credential},
	}, nil
}

// VerifySaved verifies evidence of a file as [Question.Verify] does, with the
// challenge that the file itself holds. The PCRs are those that the file's
// question named.
func (v *Verifier) VerifySaved(ctx context.Context, s *attestv1.Saved) ([]attestation.Claims, error) {
	if s.GetVersion() != savedVersion || len(s.GetBinder()) != attestation.BinderSize ||
		len(s.GetOffers()) != 1 || len(s.GetAsks()) != 1 || len(s.GetItems()) != 1 || len(s.GetCredentialSecrets()) != 1 {
		return nil, fmt.Errorf("%w: not a saved exchange of version %d with one TPM", ErrMalformed, savedVersion)
	}
	for _, i := range []*attestv1.Item{s.GetOffers()[0], s.GetAsks()[0], s.GetItems()[0]} {
		if i.GetKind() != string(attestation.TPM) {
			return nil, fmt.Errorf("%w: kind %q", ErrMalformed, i.GetKind())
		}
	}
	var ask attestv1.TPMAsk
	if err := proto.Unmarshal(s.GetAsks()[0].GetData(), &ask); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if err := checkPCRs(ask.GetPcrs()); err != nil {
		return nil, fmt.Errorf("%w: PCRs %v", ErrMalformed, ask.GetPcrs())
	}
	q, err := v.Begin(ctx, s.GetOffers()[0].GetData())
	if err != nil {
		return nil, err
	}
	asked := q.(*question)
	asked.pcrs = ask.GetPcrs()
	if copy(asked.credential[:], s.GetCredentialSecrets()[0]) != len(asked.credential) {
		return nil, fmt.Errorf("%w: credential", ErrMalformed)
	}
	return asked.Verify(ctx, s.GetItems()[0].GetData(), attestation.Binder(s.GetBinder()))
}
