package snp_test

import (
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/test/sim/amd"
)

// A machine whose key was taken back carries the list of the time before, or that of
// another kind of key. Both are signed and of this time.
func TestARevocationIsNotForgotten(t *testing.T) {
	chip := newChip(t, "Milan")
	ev := must[*evidence](t)(chip.Evidence(amd.Report{Data: testBinder}))
	old := ev.Crl
	dir := t.TempDir()
	open := func() *endorsement.Memory { return must[*endorsement.Memory](t)(endorsement.OpenMemory(dir)) }
	remembering := func(m *endorsement.Memory) func(*snp.VerifierOptions) {
		return func(o *snp.VerifierOptions) { o.Memory = m }
	}
	memory := open()
	v := lab(t, chip.Authority, remembering(memory))
	c, err := verify(t.Context(), v, ev)
	if err != nil {
		t.Fatal(err)
	}
	if list := parseList(t, old); !c.Until.Equal(list.NextUpdate) {
		t.Errorf("the claims rest until %s, not on the list that ends on %s", c.Until, list.NextUpdate)
	}
	newer := must[[]byte](t)(chip.CRL(time.Now().Add(-time.Minute), time.Now().Add(time.Hour), chip.ASK.SerialNumber))
	_, err = verify(t.Context(), v, clone(ev, func(e *evidence) { e.Crl = newer }))
	refused(t, err, snp.ErrRevoked)
	_, err = verify(t.Context(), v, ev)
	refused(t, err, snp.ErrRevoked) // by the list that was good before

	// Another process, and another verifier of the same one.
	if err := memory.Close(); err != nil {
		t.Fatal(err)
	}
	again := open()
	defer again.Close()
	for range 2 {
		_, err = verify(t.Context(), lab(t, chip.Authority, remembering(again)), ev)
		refused(t, err, snp.ErrRevoked)
	}
	// A list that has ended says what was taken back all the same.
	ended := must[[]byte](t)(chip.CRL(chip.ARK.NotBefore, chip.ARK.NotBefore.Add(time.Minute), chip.ASK.SerialNumber))
	fresh := lab(t, chip.Authority)
	if _, err := verify(t.Context(), fresh, clone(ev, func(e *evidence) { e.Crl = ended })); err == nil {
		t.Error("a list that has ended is accepted")
	}
	_, err = verify(t.Context(), fresh, ev)
	refused(t, err, snp.ErrRevoked)
	// A stranger's list says nothing.
	stranger := must[*amd.Authority](t)(amd.New(amd.Options{Product: "Milan", Forged: true}))
	forged := must[[]byte](t)(stranger.CRL(time.Now().Add(-time.Minute), time.Now().Add(time.Hour), chip.ASK.SerialNumber))
	fresh = lab(t, chip.Authority)
	if _, err := verify(t.Context(), fresh, clone(ev, func(e *evidence) { e.Crl = forged })); err == nil {
		t.Error("a stranger's list is accepted")
	}
	if _, err := verify(t.Context(), fresh, ev); err != nil {
		t.Errorf("after a stranger's list: %v", err)
	}
}
