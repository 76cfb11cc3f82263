package keyservice

import (
	"context"
	"crypto/rand"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/tpm"
)

// PolicySource is the policy in force. A reload replaces it as a whole, or not
// at all.
type PolicySource struct {
	path    string
	log     *slog.Logger
	current atomic.Pointer[policy.Policy]
}

// NewPolicySource loads the policy at path.
func NewPolicySource(path string, log *slog.Logger) (*PolicySource, error) {
	s := &PolicySource{path: path, log: log}
	return s, s.Reload()
}

// Reload reads the file again. An error leaves the policy in force as it is.
func (s *PolicySource) Reload() error {
	p, err := policy.Load(s.path)
	if err != nil {
		return err
	}
	s.current.Store(p)
	s.log.Info("policy in force", "sha256", p.Hash(), "profiles", len(p.Profiles()), "grants", len(p.Grants()))
	return nil
}

// Current returns the policy in force.
func (s *PolicySource) Current() *policy.Policy { return s.current.Load() }

// Appraise implements atls.Appraiser.
func (s *PolicySource) Appraise(_ context.Context, v *attestation.Verified) (time.Duration, error) {
	p := s.Current()
	if _, err := p.Appraise(v); err != nil {
		return 0, err
	}
	return p.Lifetime(), nil
}

// TPMTrust is what the TPM verifier works with under the policy in force.
func (s *PolicySource) TPMTrust() tpm.Trust { return TPMTrust(s.Current()) }

// TPMTrust translates a policy for the TPM verifier.
func TPMTrust(p *policy.Policy) tpm.Trust {
	t := tpm.Trust{PCRs: p.PCRs()}
	for _, r := range p.TPM().Roots {
		t.Roots = append(t.Roots, tpm.Root{Name: r.Name, Certificate: r.Certificate()})
	}
	for _, e := range p.TPM().Enrolled {
		t.Enrolled = append(t.Enrolled, tpm.Enrolled{Name: e.Name, EKDigest: e.EK})
	}
	return t
}

// newID returns a correlation ID.
func newID() string { return rand.Text()[:16] }
