package atls

import (
	"context"
	"errors"
	"fmt"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

// asked is what one peer is asked for, and which of it was refused.
//
// Where Peers.Demand chooses, it asks for all that may be of use, and a machine may
// have one kind that is trusted and another that is not, such as the vTPM of a host
// that the policy says nothing of. A kind that is refused is then left out, as if it
// had not been offered, and the appraiser decides on what remains.
type asked struct {
	optional  bool
	kinds     []attestation.Kind
	questions []attestation.Question
	refused   []error
}

// ask begins with every kind that the peer must give evidence of.
func (p *Peers) ask(ctx context.Context, offers []*attestv1.Item) (*asked, error) {
	verifiers, err := p.demanded(kindsOf(offers))
	if err != nil {
		return nil, err
	}
	a := &asked{optional: p.Demand != nil}
	for _, v := range verifiers {
		offer, ok := findItem(offers, v.Kind())
		if !ok {
			return nil, fmt.Errorf("%w: %w: no %s evidence on offer", attestation.ErrRefused, ErrPeerUnattested, v.Kind())
		}
		q, err := v.Begin(ctx, offer)
		if a.leaveOut(v.Kind(), err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		a.kinds, a.questions = append(a.kinds, v.Kind()), append(a.questions, q)
	}
	if len(a.questions) == 0 {
		return nil, a.because(nil)
	}
	return a, nil
}

func (a *asked) items() []*attestv1.Item {
	items := make([]*attestv1.Item, len(a.questions))
	for n, q := range a.questions {
		items[n] = &attestv1.Item{Kind: string(a.kinds[n]), Data: q.Ask()}
	}
	return items
}

// prove verifies the answers, one for each question and in their order.
func (a *asked) prove(ctx context.Context, items []*attestv1.Item, binder attestation.Binder) ([]attestation.Claims, error) {
	if len(items) != len(a.questions) {
		return nil, fmt.Errorf("%w: %d items of evidence for %d asks", ErrFrame, len(items), len(a.questions))
	}
	var claims []attestation.Claims
	for n, q := range a.questions {
		if items[n].GetKind() != string(a.kinds[n]) {
			return nil, fmt.Errorf("%w: %q evidence where %s was asked for", ErrFrame, items[n].GetKind(), a.kinds[n])
		}
		proved, err := q.Verify(ctx, items[n].GetData(), binder)
		if a.leaveOut(a.kinds[n], err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		claims = append(claims, proved...)
	}
	if len(claims) == 0 {
		return nil, a.because(nil)
	}
	return claims, nil
}

// leaveOut reports whether a kind that ended in err is left out.
func (a *asked) leaveOut(kind attestation.Kind, err error) bool {
	if !a.optional || !errors.Is(err, attestation.ErrRefused) {
		return false
	}
	a.refused = append(a.refused, fmt.Errorf("%s: %w", kind, err))
	return true
}

// because puts what was left out before err: it is most often the reason.
func (a *asked) because(err error) error {
	for n := len(a.refused) - 1; n >= 0; n-- {
		if err == nil {
			err = a.refused[n]
			continue
		}
		err = fmt.Errorf("%w; %w", a.refused[n], err)
	}
	return err
}
