package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/keyagent/keyagent/attestation"
)

// Refusals, for errors.Is.
var (
	// ErrMismatch means that the evidence is genuine and no profile fits it.
	ErrMismatch = fmt.Errorf("%w: no profile fits", attestation.ErrRefused)
	// ErrKinds means that no profile can be satisfied by the kinds of evidence on
	// offer.
	ErrKinds = fmt.Errorf("%w: not the kinds of evidence that are demanded", attestation.ErrRefused)
	// ErrDenied means that the machine is known, and no grant allows what it asks.
	ErrDenied = errors.New("policy denied")
)

// Appraisal says that verified evidence fits a profile of one policy.
type Appraisal struct {
	Profile  string
	Warnings []Mismatch         // of warn_only values
	kinds    []attestation.Kind // that the profile has sections for
	verified *attestation.Verified
	policy   *Policy
}

// Mismatch is one difference between a profile and the evidence.
type Mismatch struct {
	Profile  string      `json:"profile"`
	Field    string      `json:"field"` // "pcr4", "trust", "snp.debug", "tdx.rtmr1"
	Expected []string    `json:"expected"`
	Found    string      `json:"found"`
	Events   []EventDiff `json:"events,omitempty"`
}

// EventDiff is one entry of the boot log that differs. An empty Expected means
// that the entry is new, an empty Found that it is missing.
type EventDiff struct {
	Type     string `json:"type"`
	Name     string `json:"name"`
	Seq      int    `json:"seq,omitempty"` // in the machine's log
	Expected string `json:"expected,omitempty"`
	Found    string `json:"found,omitempty"`
	Detail   string `json:"detail,omitempty"` // what the log says of it; not proved
	// ExpectedDetail is what the profile says of it.
	ExpectedDetail string `json:"expected_detail,omitempty"`
}

func (m Mismatch) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: expected %s, found %s", m.Field, strings.Join(m.Expected, " or "), m.Found)
	for _, e := range m.Events {
		b.WriteString("; " + e.String())
	}
	return b.String()
}

func (e EventDiff) String() string {
	what := e.Name
	if e.Seq > 0 {
		what = fmt.Sprintf("event #%d %s", e.Seq, e.Name)
	}
	switch {
	case e.Expected == "":
		return fmt.Sprintf("%s (%s) was not expected: found %s", what, e.Type, e.Found)
	case e.Found == "":
		return fmt.Sprintf("%s (%s) is missing: expected %s", what, e.Type, e.Expected)
	}
	text := fmt.Sprintf("%s (%s): expected %s, found %s", what, e.Type, e.Expected, e.Found)
	if words := e.inWords(); words != "" {
		text += "; " + words
	}
	return text
}

// MismatchError refuses evidence. It reports on the profile that comes closest.
type MismatchError struct {
	Profile    string
	Mismatches []Mismatch
	show       bool
}

// Unwrap makes the error an ErrMismatch.
func (e *MismatchError) Unwrap() error { return ErrMismatch }

func (e *MismatchError) Error() string {
	parts := make([]string, len(e.Mismatches))
	for i, m := range e.Mismatches {
		parts[i] = m.String()
	}
	return fmt.Sprintf("%v: closest is %q: %s", ErrMismatch, e.Profile, strings.Join(parts, "; "))
}

// PeerDetail is what the refused machine may see.
func (e *MismatchError) PeerDetail() string {
	if !e.show {
		return ""
	}
	return e.Error()
}

// Appraise finds the first profile that fits. The error is a [*MismatchError].
func (p *Policy) Appraise(v *attestation.Verified) (*Appraisal, error) {
	return p.appraise(v, func(string) bool { return true })
}

// AppraiseReplica is Appraise that finds a profile of replicas first: a machine that fits an
// earlier one too is a replica all the same.
func (p *Policy) AppraiseReplica(v *attestation.Verified) (*Appraisal, error) {
	a, err := p.appraise(v, func(profile string) bool { return slices.Contains(p.replicas, profile) })
	if err != nil {
		return p.Appraise(v)
	}
	return a, nil
}

func (p *Policy) appraise(v *attestation.Verified, by func(profile string) bool) (*Appraisal, error) {
	var closest *MismatchError
	for i := range p.profiles {
		pr := &p.profiles[i]
		if !by(pr.Name) {
			continue
		}
		hard, soft := pr.compare(v)
		if len(hard) == 0 {
			a := &Appraisal{Profile: pr.Name, Warnings: soft, verified: v, policy: p}
			for _, p := range pr.parts {
				a.kinds = append(a.kinds, p.kind.Name)
			}
			return a, nil
		}
		if closest == nil || len(hard) < len(closest.Mismatches) {
			closest = &MismatchError{Profile: pr.Name, Mismatches: hard, show: pr.ShowMismatch}
		}
	}
	if closest == nil {
		return nil, ErrMismatch
	}
	return nil, closest
}

// Demand returns the evidence to ask a machine for that offers these kinds: all
// that some profile demands which the offer can satisfy.
func (p *Policy) Demand(offered []attestation.Kind) ([]attestation.Kind, error) {
	var ask []attestation.Kind
	var wanted []string
	for i := range p.profiles {
		kinds := p.profiles[i].Kinds()
		if want := join(kinds); !slices.Contains(wanted, want) {
			wanted = append(wanted, want)
		}
		if slices.ContainsFunc(kinds, func(k attestation.Kind) bool { return !slices.Contains(offered, k) }) {
			continue
		}
		for _, k := range kinds {
			if !slices.Contains(ask, k) {
				ask = append(ask, k)
			}
		}
	}
	if len(ask) == 0 {
		return nil, fmt.Errorf("%w: it offers %s, a profile demands %s", ErrKinds, join(offered), strings.Join(wanted, " or "))
	}
	// What carries the claims of others comes alone: those others would say the
	// same once more.
	for _, carrier := range p.kinds {
		if slices.Contains(ask, carrier.Name) {
			ask = slices.DeleteFunc(ask, func(k attestation.Kind) bool { return slices.Contains(carrier.Carries, k) })
		}
	}
	return ask, nil
}

func join(kinds []attestation.Kind) string {
	if len(kinds) == 0 {
		return "nothing"
	}
	parts := make([]string, len(kinds))
	for i, k := range kinds {
		parts[i] = string(k)
	}
	return strings.Join(parts, "+")
}

// maxDiff bounds how many differing events are reported.
const maxDiff = 32

// diffEvents cuts what is equal at both ends and pairs the rest in order.
func diffEvents(want, got []attestation.Event) []EventDiff {
	for len(want) > 0 && len(got) > 0 && want[0].Digest == got[0].Digest {
		want, got = want[1:], got[1:]
	}
	for len(want) > 0 && len(got) > 0 && want[len(want)-1].Digest == got[len(got)-1].Digest {
		want, got = want[:len(want)-1], got[:len(got)-1]
	}
	var out []EventDiff
	for (len(want) > 0 || len(got) > 0) && len(out) < maxDiff {
		switch {
		case len(want) > 0 && len(got) > 0 && want[0].Digest == got[0].Digest:
			want, got = want[1:], got[1:]
		case len(want) > 0 && len(got) > 0 && want[0].Type == got[0].Type && want[0].Name == got[0].Name:
			out = append(out, EventDiff{Type: got[0].Type, Name: got[0].Name, Seq: got[0].Seq,
				Expected: want[0].Digest, Found: got[0].Digest, Detail: got[0].Detail, ExpectedDetail: want[0].Detail})
			want, got = want[1:], got[1:]
		case len(want) > 0 && (len(got) == 0 || !hasLater(got, want[0])):
			out = append(out, EventDiff{Type: want[0].Type, Name: want[0].Name, Expected: want[0].Digest, ExpectedDetail: want[0].Detail})
			want = want[1:]
		default:
			out = append(out, EventDiff{Type: got[0].Type, Name: got[0].Name, Seq: got[0].Seq, Found: got[0].Digest, Detail: got[0].Detail})
			got = got[1:]
		}
	}
	return out
}

func hasLater(got []attestation.Event, e attestation.Event) bool {
	return slices.ContainsFunc(got[:min(len(got), 256)], func(g attestation.Event) bool {
		return g.Type == e.Type && g.Name == e.Name
	})
}

// Request is what a machine asks for.
type Request struct {
	Volume    string
	Operation Operation
	Now       time.Time
	ReadOnly  bool // it maps the volume read-only
}

// Decision allows a request.
type Decision struct {
	Grant      string
	Owners     []string // whose volumes the grant may touch: its own and adopted ones
	Profile    string
	PolicyHash string
	Warnings   []Mismatch
	Writers    Writers       // who may write the volume at the same time
	Expiry     bool          // a writer whose lease has ended may be replaced
	Lease      time.Duration // of a writer
	Offline    OfflineLimits // of openings without the key service; zero: none
}

// Authorize finds the first grant that allows the request. The error wraps
// [ErrDenied] and says what is missing.
func (p *Policy) Authorize(a *Appraisal, r Request) (Decision, error) {
	if a == nil || a.policy != p {
		return Decision{}, fmt.Errorf("%w: the appraisal is of another policy", ErrDenied)
	}
	if !ValidVolume(r.Volume) {
		return Decision{}, fmt.Errorf("%w: %q is not a volume ID", ErrDenied, cut(r.Volume, 64))
	}
	why := fmt.Sprintf("no grant for profile %q", a.Profile)
	for i := range p.grants {
		g := &p.grants[i]
		switch {
		case !slices.Contains(g.Profiles, a.Profile):
			continue
		case !slices.ContainsFunc(g.Volumes, func(pattern string) bool { return Match(pattern, r.Volume) }):
			why = fmt.Sprintf("no grant for profile %q covers volume %q", a.Profile, r.Volume)
			continue
		case !slices.Contains(g.Operations, r.Operation):
			why = fmt.Sprintf("grant %q does not allow %q", g.Name, r.Operation)
			continue
		case g.Writers == WritersReaders && !r.ReadOnly:
			why = fmt.Sprintf("grant %q is for readers only", g.Name)
			continue
		}
		if g.when != nil {
			ok, err := g.when.holds(a, r)
			if err != nil {
				// An expression that fails allows nothing.
				why = fmt.Sprintf("grant %q: %v", g.Name, err)
				continue
			}
			if !ok {
				why = fmt.Sprintf("grant %q: its expression is false", g.Name)
				continue
			}
		}
		return Decision{Grant: g.Name, Owners: append([]string{g.Name}, g.Adopts...), Profile: a.Profile,
			PolicyHash: p.hash, Warnings: a.Warnings, Writers: g.Writers, Expiry: g.Takeover == takeoverExpiry, Lease: g.lease, Offline: g.offline}, nil
	}
	return Decision{}, fmt.Errorf("%w: %s", ErrDenied, why)
}

// AuthorizeReplica allows that a machine is a key service beside this one. No difference is
// small enough for that, also not one that is warn_only. The error wraps [ErrDenied].
func (p *Policy) AuthorizeReplica(a *Appraisal) error {
	if a == nil || a.policy != p {
		return fmt.Errorf("%w: the appraisal is of another policy", ErrDenied)
	}
	if !slices.Contains(p.replicas, a.Profile) {
		return fmt.Errorf("%w: profile %q is not listed in replicas", ErrDenied, a.Profile)
	}
	if len(a.Warnings) > 0 {
		return fmt.Errorf("%w: warn_only is not enough for a replica: %s", ErrDenied, a.Warnings[0])
	}
	return nil
}

func cut(s string, n int) string { return s[:min(n, len(s))] }
