package kinds

import (
	"errors"
	"fmt"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/policy"
)

// VerifierOptions configure [Verifiers].
type VerifierOptions struct {
	// Policy returns the policy in force. Required.
	Policy func() *policy.Policy
	// Endorsements has what evidence does not carry. Nil: nothing has.
	Endorsements endorsement.Source
	// Memory has what vendors were seen to say. Default: one that ends with the process.
	Memory *endorsement.Memory
	// Now is the clock for certificates. Default time.Now.
	Now func() time.Time
}

// Maker makes verifiers, each once: those that carry others use them too.
type Maker struct {
	VerifierOptions
	table Table
	made  map[attestation.Kind]attestation.Verifier
}

func (m *Maker) verifier(name attestation.Kind) (attestation.Verifier, error) {
	if v := m.made[name]; v != nil {
		return v, nil
	}
	k, ok := m.table.find(name)
	if !ok {
		return nil, fmt.Errorf("%w: %q", errUnknown, name)
	}
	v, err := k.Verifier(m)
	m.made[name] = v
	return v, err
}

// carried is the verifier of a kind that another one carries.
func carried[V attestation.Verifier](m *Maker, name attestation.Kind) (V, error) {
	v, err := m.verifier(name)
	if err != nil {
		var none V
		return none, err
	}
	return v.(V), nil
}

func (m *Maker) pcrs() []uint32 { return m.Policy().PCRs() }

// Verifiers returns a verifier of each kind, with the trust of the policy in
// force. A kind that the policy trusts nobody for refuses everything.
func (t Table) Verifiers(opts VerifierOptions) ([]attestation.Verifier, error) {
	if opts.Policy == nil {
		return nil, errors.New("verifiers without a policy")
	}
	if opts.Memory == nil {
		opts.Memory = &endorsement.Memory{}
	}
	m := &Maker{opts, t, map[attestation.Kind]attestation.Verifier{}}
	var all []attestation.Verifier
	for _, k := range t {
		v, err := m.verifier(k.Name)
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, nil
}
