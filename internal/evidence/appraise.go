package evidence

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/internal/failure"
)

// Verdict is what became of it.
type Verdict struct {
	Accepted   bool              `json:"accepted"`
	Identity   string            `json:"identity"`
	Trust      string            `json:"trust"`
	Proved     []Proved          `json:"proved"`
	Profile    string            `json:"profile"`
	Mismatches []policy.Mismatch `json:"mismatches,omitempty"`
	Warnings   []policy.Mismatch `json:"warnings,omitempty"`
}

// Proved is who one kind of claims is of, and who vouches.
type Proved struct {
	Kind     attestation.Kind `json:"kind"`
	Via      attestation.Kind `json:"via,omitempty"`
	Identity string           `json:"identity"`
	Trust    string           `json:"trust,omitempty"`
}

func (p Proved) String() string {
	who := fmt.Sprintf("%s %s", kindName(p.Kind), p.Identity)
	if p.Trust != "" {
		who += ", vouched for by " + p.Trust
	}
	return who
}

func kindName(k attestation.Kind) string {
	if k == attestation.Azure || k == attestation.Nitro {
		return string(k)
	}
	return strings.ToUpper(string(k))
}

// Appraise verifies evidence and compares it with the policy. A verdict comes with the
// error of evidence that is genuine and fits no profile.
func Appraise(ctx context.Context, opts kinds.VerifierOptions, s *attestv1.Saved, now time.Time) (*Verdict, error) {
	refused := func(err error) error {
		hint := ""
		if errors.Is(err, attestation.ErrUnendorsed) {
			hint = "--fetch asks the vendors, --cache names a folder that keyagent endorsements fetch filled"
		}
		return failure.New(failure.EvidenceRefused, err, hint)
	}
	if err := saved.Check(s); err != nil {
		return nil, refused(err)
	}
	demanded, err := opts.Policy().Demand(saved.Kinds(s))
	if err != nil {
		return nil, refused(err)
	}
	verifiers, err := kinds.All().Verifiers(opts)
	if err != nil {
		return nil, err
	}
	verifiers = slices.DeleteFunc(verifiers, func(v attestation.Verifier) bool { return !slices.Contains(demanded, v.Kind()) })
	claims, err := saved.Verify(ctx, verifiers, s)
	if err != nil {
		return nil, refused(err)
	}
	verified, err := attestation.NewVerified(attestation.Binder(s.GetBinder()), now, claims...)
	if err != nil {
		return nil, err
	}
	out := &Verdict{Identity: claims[0].Identity, Trust: claims[0].Trust}
	for _, c := range claims {
		out.Proved = append(out.Proved, Proved{c.Kind, c.Via, c.Identity, c.Trust})
	}
	a, err := opts.Policy().Appraise(verified)
	if err != nil {
		var m *policy.MismatchError
		if errors.As(err, &m) {
			out.Profile, out.Mismatches = m.Profile, m.Mismatches
		}
		return out, failure.New(failure.EvidenceRefused, policy.ErrMismatch, "keyagent measure makes reference values of a machine that is trusted")
	}
	out.Accepted, out.Profile, out.Warnings = true, a.Profile, a.Warnings
	return out, nil
}
