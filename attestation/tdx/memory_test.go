package tdx

import (
	"errors"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/test/sim/intel"
)

// A machine carries collateral of the time before its key was taken back, or before its
// firmware was found wanting. All of it is signed and of this time.
func TestCollateralIsNotTakenBack(t *testing.T) {
	s := newScene(t)
	dir := t.TempDir()
	open := func() *endorsement.Memory { return must[*endorsement.Memory](t)(endorsement.OpenMemory(dir)) }
	with := func(m *endorsement.Memory) *Verifier {
		return must[*Verifier](t)(NewVerifier(VerifierOptions{Trust: func() Trust { return s.trust }, Memory: m, Now: s.verifier().now}))
	}
	before := proto.CloneOf(s.ev)
	memory := open()
	v := with(memory)
	c, err := verifyWith(v, before)
	if err != nil || c.Facts["tcb_status"] != "UpToDate" || c.Until.IsZero() {
		t.Fatalf("%v, %v, until %s", err, c.Facts["tcb_status"], c.Until)
	}

	// Newer TCB info says that this firmware is out of date.
	s.tcbInfo(func(o intel.Object) {
		o["tcbEvaluationDataNumber"] = 99
		for _, l := range o["tcbLevels"].([]intel.Object) {
			l["tcbStatus"] = "OutOfDate"
		}
	})
	status := func(v *Verifier, ev *attestv1.TDXEvidence) any {
		t.Helper()
		c, err := verifyWith(v, ev)
		if err != nil {
			t.Fatal(err)
		}
		return c.Facts["tcb_status"]
	}
	if got := status(v, s.ev); got != "OutOfDate" {
		t.Fatalf("the newer one says %v", got)
	}
	if got := status(v, before); got != "OutOfDate" {
		t.Errorf("carrying the older one gives %v", got)
	}
	if err := memory.Close(); err != nil {
		t.Fatal(err)
	}
	again := open()
	defer again.Close()
	if got := status(with(again), before); got != "OutOfDate" {
		t.Errorf("after a restart the older one gives %v", got)
	}

	// And a revoked platform stays so.
	revoked := proto.CloneOf(s.ev)
	revoked.Collateral.PckCrl = s.w.CRL(s.w.Platform, s.m.PCK.Certificate)
	v = with(again)
	if _, err := verifyWith(v, revoked); !errors.Is(err, ErrRevoked) {
		t.Fatal(err)
	}
	for name, v := range map[string]*Verifier{"the same": v, "another": with(again)} {
		if _, err := verifyWith(v, before); !errors.Is(err, ErrRevoked) {
			t.Errorf("with an older list, %s verifier says %v", name, err)
		}
	}
}

// Intel has two evaluation numbers beside each other. A verifier that has seen the higher one,
// from a stranger even, goes by it while it is valid, and is not locked out of
// the lower one for ever.
func TestAHigherNumberCountsWhileItIsValid(t *testing.T) {
	s := newScene(t)
	v := must[*Verifier](t)(NewVerifier(VerifierOptions{Trust: func() Trust { return s.trust }, Now: s.verifier().now}))
	lower := proto.CloneOf(s.ev)
	s.tcbInfo(func(o intel.Object) {
		o["tcbEvaluationDataNumber"] = 99
		o["nextUpdate"] = s.now.Add(time.Hour).UTC().Format(time.RFC3339)
		for _, l := range o["tcbLevels"].([]intel.Object) {
			l["tcbStatus"] = "OutOfDate"
		}
	})
	for _, step := range []struct {
		ev   *attestv1.TDXEvidence
		in   time.Duration
		want string
	}{{lower, 0, "UpToDate"}, {s.ev, 0, "OutOfDate"}, {lower, 0, "OutOfDate"}, {lower, 2 * time.Hour, "UpToDate"}} {
		s.now = s.now.Add(step.in)
		c, err := verifyWith(v, step.ev)
		if err != nil || c.Facts["tcb_status"] != step.want {
			t.Errorf("after %s: %v, %v, want %s", step.in, c.Facts["tcb_status"], err, step.want)
		}
	}
}
