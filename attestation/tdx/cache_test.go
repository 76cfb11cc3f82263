package tdx

import (
	"errors"
	"testing"
	"time"
)

func TestACacheIsBoundedAndKeepsTime(t *testing.T) {
	c := cache[int]{limit: 3}
	now := time.Now()
	valid := validity{now.Add(-time.Hour), now.Add(time.Hour)}
	for i := range 10 {
		c.add(keyOf([]byte{byte(i)}), i, valid)
		if v, ok := c.get(keyOf([]byte{byte(i)}), now); !ok || v != i {
			t.Errorf("%d is forgotten at once", i)
		}
		if len(c.known) > 3 {
			t.Fatalf("%d entries", len(c.known))
		}
	}
	for _, off := range []time.Duration{-2 * time.Hour, 2 * time.Hour} {
		if _, ok := c.get(keyOf([]byte{9}), now.Add(off)); ok {
			t.Errorf("remembered %s off", off)
		}
	}
	// Parts do not run into each other.
	if keyOf([]byte("ab"), []byte("c")) == keyOf([]byte("a"), []byte("bc")) || keyOf([]byte("a")) == keyOf([]byte("a"), nil) {
		t.Error("two keys are one")
	}
}

// TestWhatIsRememberedIsOfOneRootAndOneCA: a reloaded policy takes effect, however
// much is remembered under the old one.
func TestWhatIsRememberedIsOfOneRootAndOneCA(t *testing.T) {
	s := newScene(t)
	v := s.verifier()
	if _, err := verifyWith(v, s.ev); err != nil {
		t.Fatal(err)
	}
	docs := documents(s.ev.Collateral)
	p := must[*pck](t)(parsePCK(s.m.Chain()))
	processor := must[*pck](t)(parsePCK(newScene(t, shapes[1].change).m.Chain()))
	if _, err := v.verifyDocuments(s.w.Root.Certificate, p, docs, s.now); err != nil {
		t.Fatal(err)
	}
	if _, err := v.verifyDocuments(s.w.Root.Certificate, processor, docs, s.now); !errors.Is(err, ErrCRL) {
		t.Errorf("another CA: %v", err)
	}
	if _, err := v.verifyDocuments(Intel().Certificate, p, docs, s.now); !errors.Is(err, ErrCollateral) {
		t.Errorf("another root: %v", err)
	}
	s.trust.Roots = []Root{Intel()}
	if _, err := verifyWith(v, s.ev); !errors.Is(err, ErrUntrusted) {
		t.Errorf("the policy names another root: %v", err)
	}
	// A certificate that is revoked later is refused later.
	s.trust.Roots = []Root{{"lab", s.w.Root.Certificate}}
	s.ev.Collateral.PckCrl = s.w.CRL(s.w.Platform, s.m.PCK.Certificate)
	if _, err := verifyWith(v, s.ev); !errors.Is(err, ErrRevoked) {
		t.Errorf("revoked meanwhile: %v", err)
	}
}
