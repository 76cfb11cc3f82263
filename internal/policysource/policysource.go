// Package policysource keeps the policy that is in force: a file that is replaced as
// a whole, or not at all, while verifiers use it.
package policysource

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/attestation/policy"
)

// Source is the policy in force. A reload replaces it as a whole, or not
// at all.
type Source struct {
	path    string
	log     *slog.Logger
	current atomic.Pointer[policy.Policy]
}

// New loads the policy at path.
func New(path string, log *slog.Logger) (*Source, error) {
	s := &Source{path: path, log: log}
	return s, s.Reload()
}

// Reload reads the file again. An error leaves the policy in force as it is.
func (s *Source) Reload() error {
	p, err := kinds.LoadPolicy(s.path)
	if err != nil {
		return err
	}
	s.current.Store(p)
	s.log.Info("policy in force", "sha256", p.Hash(), "profiles", len(p.Profiles()), "grants", len(p.Grants()))
	return nil
}

// Current returns the policy in force.
func (s *Source) Current() *policy.Policy { return s.current.Load() }

// Appraise implements atls.Appraiser.
func (s *Source) Appraise(_ context.Context, v *attestation.Verified) (time.Duration, error) {
	p := s.Current()
	if _, err := p.Appraise(v); err != nil {
		return 0, err
	}
	return lifetime(p.Lifetime(), v)
}

// Replica refuses a machine that is no key service beside this one, by the policy in force.
func (s *Source) Replica(v *attestation.Verified) error {
	p := s.Current()
	a, err := p.AppraiseReplica(v)
	if err != nil {
		return err
	}
	if err := p.AuthorizeReplica(a); err != nil {
		return fmt.Errorf("%w: %w", attestation.ErrRefused, err)
	}
	return nil
}

// replicas appraises who must be a replica.
type replicas struct{ *Source }

// Appraise implements atls.Appraiser.
func (r replicas) Appraise(ctx context.Context, v *attestation.Verified) (time.Duration, error) {
	if err := r.Replica(v); err != nil {
		return 0, err
	}
	return r.Source.Appraise(ctx, v)
}

// lifetime of a verdict: the policy's, but not longer than what the evidence rests on.
func lifetime(most time.Duration, v *attestation.Verified) (time.Duration, error) {
	until := v.Until()
	if until.IsZero() {
		return most, nil
	}
	left := until.Sub(v.At())
	if left <= 0 {
		return 0, fmt.Errorf("%w: what the evidence rests on ends on %s", attestation.ErrUnendorsed, until.Format(time.RFC3339))
	}
	return min(most, left), nil
}

// Peers is what a peer must prove under the policy in force: the evidence of some
// profile. Endorsements that it does not carry come from source, which may be nil.
// memory may be nil: then what was seen is forgotten with the process.
func (s *Source) Peers(source endorsement.Source, memory *endorsement.Memory) (*atls.Peers, error) {
	verifiers, err := kinds.All().Verifiers(kinds.VerifierOptions{Policy: s.Current, Endorsements: source, Memory: memory})
	if err != nil {
		return nil, err
	}
	demand := func(offered []attestation.Kind) ([]attestation.Kind, error) { return s.Current().Demand(offered) }
	return &atls.Peers{Verifiers: verifiers, Demand: demand, Appraiser: s}, nil
}

// Replicas is what Peers is for who must be a key service beside this one.
func (s *Source) Replicas(source endorsement.Source, memory *endorsement.Memory) (*atls.Peers, error) {
	peers, err := s.Peers(source, memory)
	if err == nil {
		peers.Appraiser = replicas{s}
	}
	return peers, err
}
