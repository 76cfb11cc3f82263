package atls

import (
	"errors"
	"testing"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/internal/secret"
)

func mustSecret(t testing.TB, text string) *secret.Bytes {
	t.Helper()
	s, err := secret.From([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func sealed(t testing.TB, c *Channel, info string) []byte {
	t.Helper()
	out, err := c.Seal([]byte(info), mustSecret(t, "a key of 32 bytes, or so it says"))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func opens(c *Channel, info string, sealed []byte) error {
	s, err := c.Open([]byte(info), sealed)
	if err == nil {
		err = s.Close()
	}
	return err
}

func TestWhatIsSealedOpensOnItsChannelOnly(t *testing.T) {
	c, other := newCouple(node()), newCouple(node())
	c.mustRun(t)
	other.mustRun(t)
	box := sealed(t, c.server, "volume data-1")
	if err := opens(c.client, "volume data-1", box); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"another channel":     opens(other.client, "volume data-1", box),
		"the sender's own":    opens(c.server, "volume data-1", box),
		"another info":        opens(c.client, "volume data-2", box),
		"no info":             opens(c.client, "", box),
		"cut":                 opens(c.client, "volume data-1", box[:len(box)-1]),
		"longer":              opens(c.client, "volume data-1", append(box[:len(box):len(box)], 0)),
		"nothing":             opens(c.client, "volume data-1", nil),
		"a bit of it changed": opens(c.client, "volume data-1", flipped(box, len(box)-1)),
		"its key share":       opens(c.client, "volume data-1", flipped(box, 3)),
	} {
		if !errors.Is(err, ErrSealed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := c.client.Seal(nil, mustSecret(t, "x"))
	wantErr(t, err, ErrPeerUnattested)
}

func flipped(b []byte, i int) []byte {
	out := append([]byte(nil), b...)
	out[i] ^= 1
	return out
}

func TestAnAnswerUnderWayOpensAfterARenewal(t *testing.T) {
	c := newCouple(node())
	c.mustRun(t)
	first := sealed(t, c.server, "")
	c.mustRun(t)
	second := sealed(t, c.server, "")
	for name, box := range map[string][]byte{"the one before": first, "the new one": second} {
		if err := opens(c.client, "", box); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	c.mustRun(t)
	wantErr(t, opens(c.client, "", first), ErrSealed)
}

// On another stream, an answer that is sealed to the new key can overtake the
// verdict that accepts it.
func TestAnAnswerThatOvertakesTheVerdictOpens(t *testing.T) {
	c := newCouple(node())
	c.mustRun(t)
	var early error
	c.fromServer = change(verdictOf, func(*attestv1.Verdict) { early = opens(c.client, "", sealed(t, c.server, "")) })
	c.mustRun(t)
	if early != nil {
		t.Error(early)
	}
}

// An exchange that fails leaves the keys of the one before in place.
func TestARefusedRenewalLeavesTheKeysInPlace(t *testing.T) {
	c := newCouple(node())
	c.mustRun(t)
	box := sealed(t, c.server, "")
	c.fromClient = change(evidenceOf, func(e *attestv1.Evidence) { e.Items[0].Data = nil })
	for range 3 {
		if client, _ := c.run(); client == nil {
			t.Fatal("the renewal was accepted")
		}
	}
	if err := opens(c.client, "", box); err != nil {
		t.Error(err)
	}
}
