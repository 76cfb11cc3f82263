package atls

import (
	"errors"
	"slices"
	"testing"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// anyOf demands what is offered of these kinds, as a policy with a profile for each
// does.
func anyOf(kinds ...attestation.Kind) *Peers {
	p := demand(kinds...)
	p.Demand = func(offered []attestation.Kind) ([]attestation.Kind, error) {
		return slices.DeleteFunc(slices.Clone(kinds), func(k attestation.Kind) bool { return !slices.Contains(offered, k) }), nil
	}
	return p
}

// A kind that is refused counts as not offered: the rest decides. With nothing
// left, or if the rest is not enough, the refusal is what the error says.
func TestAKindThatIsRefusedIsLeftOut(t *testing.T) {
	forged := func(n int) func(*couple) {
		return func(c *couple) {
			c.fromClient = change(evidenceOf, func(e *attestv1.Evidence) { e.Items[n].Data = nil })
		}
	}
	couple := func() *couple {
		c := newCouple(&machine{kind: "fake", identity: "node", epoch: "1"}, &machine{kind: "other", identity: "chip", epoch: "1"})
		c.server.peers = anyOf("fake", "other")
		return c
	}
	for n, remains := range []string{"other:chip", "fake:node"} {
		c := couple()
		var dropped []error
		c.server.observe = func(o Outcome) { dropped = o.Dropped }
		forged(n)(c)
		c.mustRun(t)
		if v, _, err := c.server.Peer(); err != nil || v.Identity() != remains {
			t.Errorf("%v, %v", v, err)
		}
		if len(dropped) != 1 || !errors.Is(dropped[0], errForged) {
			t.Errorf("the observer hears of %v", dropped)
		}
	}
	c := couple()
	c.fromClient = change(evidenceOf, func(e *attestv1.Evidence) { e.Items[0].Data, e.Items[1].Data = nil, nil })
	c.wantRefusal(t, errForged)

	c = newCouple(&machine{kind: "fake", identity: "stranger", epoch: "1"}, &machine{kind: "other", identity: "chip", epoch: "1"})
	c.server.peers = anyOf("fake", "other")
	forged(1)(c)
	c.wantRefusal(t, errForged)

	// Without a choice nothing is left out.
	c = newCouple(&machine{kind: "fake", identity: "node", epoch: "1"}, &machine{kind: "other", identity: "chip", epoch: "1"})
	c.server.peers = demand("fake", "other")
	forged(1)(c)
	c.wantRefusal(t, errForged)
}
