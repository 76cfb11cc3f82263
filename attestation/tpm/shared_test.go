package tpm

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// answer lets v ask a, and returns what it says.
func answer(t *testing.T, v *Verifier, a attestation.Attempt) error {
	t.Helper()
	q, err := v.Begin(t.Context(), a.Offer())
	if err != nil {
		return err
	}
	evidence, err := a.Evidence(t.Context(), q.Ask(), testBinder)
	if err != nil {
		return err
	}
	_, err = q.Verify(t.Context(), evidence, testBinder)
	return err
}

// Case 82: who takes an offer and never asks keeps nobody from the TPM.
func TestASharedTPMIsTakenForAnswersAlone(t *testing.T) {
	p := swtpm.New(t, nil)
	trust := trustOf(t, p)
	extendAll(t, p, trust.PCRs...)
	v := newVerifier(t, trust)
	i := newIssuer(t, p, IssuerOptions{Shared: true})
	begin := func() attestation.Attempt {
		t.Helper()
		a, err := i.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { a.Close() })
		return a
	}
	silent := []attestation.Attempt{begin(), begin(), begin()}
	for range 2 {
		if err := answer(t, v, begin()); err != nil {
			t.Error(err)
		}
	}
	if err := answer(t, v, silent[0]); err != nil {
		t.Errorf("one that asks late: %v", err)
	}
	// An offer of keys that the TPM has no more is not answered, and not made again.
	i.offer.data = append(i.offer.data, 0x7a, 0)
	if err := answer(t, v, begin()); !errors.Is(err, errOtherKeys) {
		t.Errorf("other keys: %v", err)
	}
	if err := answer(t, v, begin()); err != nil {
		t.Errorf("after that: %v", err)
	}
}

func TestWaitingForTheTPMHonoursTheContext(t *testing.T) {
	p := swtpm.New(t, nil)
	i := newIssuer(t, p, IssuerOptions{})
	first, err := i.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := i.Begin(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := i.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(second.Close(), second.Close()); err != nil {
		t.Error(err)
	}
}
