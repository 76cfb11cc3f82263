// Package kinds is the table of all kinds of evidence: what each is called, how a machine
// is found to have it, how it is made, verified and shown, what a policy can say of it,
// and which other kinds it carries. Nothing else knows all of them: a new kind is a
// package and a line in [All].
package kinds

import (
	"context"
	"fmt"
	"io"
	"slices"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/policy"
)

// Kind is one kind of evidence.
type Kind struct {
	// Kind has its name, what it carries, and its sections of a policy.
	policy.Kind
	// Detect says how this machine has it, or why not.
	Detect func(context.Context, IssuerOptions) (how string, err error)
	// Issuer makes what gives it on this machine. It touches no hardware.
	Issuer func(IssuerOptions) (attestation.Issuer, error)
	// Verifier makes what judges it. A kind that carries others asks v for theirs.
	Verifier func(v *Maker) (attestation.Verifier, error)
	// Summarize says to people what evidence says. Nothing is verified.
	Summarize func(Exchange) (Summary, error)
	// Claims are what evidence says, not verified: for reference values of a machine that
	// is trusted for another reason.
	Claims func(Exchange) ([]attestation.Claims, error)
	// Endorsements is what a verifier has to have from vendors, nil if nothing. product is
	// that of an SNP report of version 2, which does not name it.
	Endorsements func(evidence []byte, product string) ([]endorsement.Request, error)
}

// Table is kinds, the strongest first.
type Table []Kind

// All are the kinds of keyagent.
func All() Table { return Table{azureKind(), svsmKind(), snpKind(), tdxKind(), nitroKind(), tpmKind()} }

// Policies is what policies can say of the kinds.
func (t Table) Policies() []policy.Kind {
	out := make([]policy.Kind, len(t))
	for i, k := range t {
		out[i] = k.Kind
	}
	return out
}

// LoadPolicy reads a policy that may speak of all kinds.
func LoadPolicy(path string) (*policy.Policy, error) { return policy.Load(All().Policies(), path) }

// Names of the kinds.
func (t Table) Names() []string {
	out := make([]string, len(t))
	for i, k := range t {
		out[i] = string(k.Name)
	}
	return out
}

func (t Table) find(name attestation.Kind) (Kind, bool) {
	n := slices.IndexFunc(t, func(k Kind) bool { return k.Name == name })
	if n < 0 {
		return Kind{}, false
	}
	return t[n], true
}

// of a policy's own table, which has the parts that a policy needs.
func ofPolicy(name attestation.Kind) policy.Kind {
	all := policy.Builtin()
	return all[slices.IndexFunc(all, func(k policy.Kind) bool { return k.Name == name })]
}

// Exchange is one exchange of a file that saved.Check accepts.
type Exchange struct{ Offer, Ask, Evidence []byte }

// Summary is what one piece of evidence says, for people. None of it is verified.
type Summary interface {
	Print(w io.Writer)
}

var errUnknown = fmt.Errorf("%w: kind that is not known here", attestation.ErrRefused)

// exchange finds a kind's part of a file.
func (t Table) exchange(s *attestv1.Saved, name attestation.Kind) (Kind, Exchange, error) {
	k, ok := t.find(name)
	if !ok {
		return Kind{}, Exchange{}, fmt.Errorf("%w: %q evidence", errUnknown, name)
	}
	for n, i := range s.GetItems() {
		if i.GetKind() == string(name) && n < len(s.GetOffers()) && n < len(s.GetAsks()) {
			return k, Exchange{s.GetOffers()[n].GetData(), s.GetAsks()[n].GetData(), i.GetData()}, nil
		}
	}
	return Kind{}, Exchange{}, fmt.Errorf("%w: no %s evidence in the file", attestation.ErrRefused, name)
}

// Summarize reads a file's evidence of one kind without verifying it.
func (t Table) Summarize(s *attestv1.Saved, name attestation.Kind) (Summary, error) {
	k, e, err := t.exchange(s, name)
	if err != nil {
		return nil, err
	}
	return k.Summarize(e)
}

// Claims returns what a file's evidence says of hardware, not verified: for reference
// values of a machine that is trusted for another reason.
func (t Table) Claims(s *attestv1.Saved, name attestation.Kind) ([]attestation.Claims, error) {
	k, e, err := t.exchange(s, name)
	if err != nil {
		return nil, err
	}
	return k.Claims(e)
}

// EndorsementRequests returns what a verifier of a file's evidence has to have from
// vendors, for fetching it beforehand. product is that of an SNP report of version 2.
func (t Table) EndorsementRequests(s *attestv1.Saved, product string) ([]endorsement.Request, error) {
	var all []endorsement.Request
	for _, i := range s.GetItems() {
		k, ok := t.find(attestation.Kind(i.GetKind()))
		if !ok || k.Endorsements == nil {
			continue
		}
		requests, err := k.Endorsements(i.GetData(), product)
		if err != nil {
			return nil, err
		}
		all = append(all, requests...)
	}
	return all, nil
}

// message is a pointer to a generated message.
type message[M any] interface {
	*M
	proto.Message
}

// decode reads one part of an exchange.
func decode[M any, P message[M]](data []byte) (P, error) {
	m := P(new(M))
	if err := proto.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("%w: %w", attestation.ErrRefused, err)
	}
	return m, nil
}
