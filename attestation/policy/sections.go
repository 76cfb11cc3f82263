package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation"
)

// Path is a place in the policy file.
type Path []any

func (p Path) To(more ...any) Path { return append(slices.Clone(p), more...) }

// part is a section of a profile and its kind.
type part struct {
	kind    *Kind
	section Section
}

// Section returns the profile's section of a kind, nil if it has none.
func (pr *Profile) Section(k attestation.Kind) Section {
	for _, p := range pr.parts {
		if p.kind.Name == k {
			return p.section
		}
	}
	return nil
}

// Set gives the profile a section of a kind of this package, nil for none.
func (pr *Profile) Set(k attestation.Kind, s Section) {
	pr.parts = slices.DeleteFunc(pr.parts, func(p part) bool { return p.kind.Name == k })
	if s == nil {
		return
	}
	all := Builtin()
	pr.parts = append(pr.parts, part{kindOf(all, k), s})
	slices.SortStableFunc(pr.parts, func(a, b part) int {
		order := func(p part) int { return slices.IndexFunc(all, func(k Kind) bool { return k.Name == p.kind.Name }) }
		return order(a) - order(b)
	})
}

func sectionOf[S Section](pr *Profile, k attestation.Kind) S {
	s, _ := pr.Section(k).(S)
	return s
}

// Azure returns the section of that kind, nil if there is none. So do the others;
// [Profile.Section] returns that of any kind.
func (pr *Profile) Azure() *AzureProfile { return sectionOf[*AzureProfile](pr, attestation.Azure) }

// SNP returns the section of an SEV-SNP report.
func (pr *Profile) SNP() *SNPProfile { return sectionOf[*SNPProfile](pr, attestation.SNP) }

// TDX returns the section of a TDX quote.
func (pr *Profile) TDX() *TDXProfile { return sectionOf[*TDXProfile](pr, attestation.TDX) }

// TPM returns the section of a TPM.
func (pr *Profile) TPM() *TPMProfile { return sectionOf[*TPMProfile](pr, attestation.TPM) }

// carrier is the kind of evidence that brings claims of others with it, nil if each
// brings its own.
func (pr *Profile) carrier() *Kind {
	for _, p := range pr.parts {
		if len(p.kind.Carries) > 0 {
			return p.kind
		}
	}
	return nil
}

// via is the kind of evidence in which the claims of a kind have to come, empty if that
// is evidence of its own.
func (pr *Profile) via(k attestation.Kind) attestation.Kind {
	if c := pr.carrier(); c != nil && slices.Contains(c.Carries, k) {
		return c.Name
	}
	return ""
}

// Kinds returns the evidence that the profile demands.
func (pr *Profile) Kinds() []attestation.Kind {
	var kinds []attestation.Kind
	for _, p := range pr.parts {
		if pr.via(p.kind.Name) == "" {
			kinds = append(kinds, p.kind.Name)
		}
	}
	return kinds
}

// WarnOnly names the reference values that only warn, for people.
func (pr *Profile) WarnOnly() (out []string) {
	for _, p := range pr.parts {
		if s, ok := p.section.(interface{ WarnOnly() []string }); ok {
			for _, register := range s.WarnOnly() {
				out = append(out, pr.Name+" "+register)
			}
		}
	}
	return out
}

// Allowed says in sentences which weaknesses the profile accepts by name, and whose
// machines it does not tell apart.
func (pr *Profile) Allowed() (out []string) {
	for _, p := range pr.parts {
		s, ok := p.section.(interface {
			Allowed() (anything string, words []string)
		})
		if !ok {
			continue
		}
		anything, words := s.Allowed()
		if anything != "" {
			out = append(out, fmt.Sprintf("profile %q accepts %s (%s)", pr.Name, anything, p.kind.Name))
		}
		if len(words) > 0 {
			out = append(out, fmt.Sprintf("profile %q accepts by name: %s (%s)", pr.Name, strings.Join(words, ", "), p.kind.Name))
		}
	}
	return out
}

// every is what a section without a list of machines accepts.
func every(what string, any bool) string {
	if any {
		return "every " + what
	}
	return ""
}

func warnOnly(prefix string, pcrs []PCR) (out []string) {
	for _, r := range pcrs {
		if r.WarnOnly {
			out = append(out, fmt.Sprintf("%s%d", prefix, *r.PCR))
		}
	}
	return out
}

// profile checks that evidence is demanded, and each section.
func (c *Checker) profile(pr *Profile, i int) {
	at := Path{"profiles", i}
	c.Demand(len(pr.parts) > 0, "no evidence is demanded: a profile needs a tpm, snp, tdx or nitro section", at...)
	for _, p := range pr.parts {
		if len(p.kind.Carries) > 0 {
			c.carries(pr, p.kind, at)
		}
	}
	for _, p := range pr.parts {
		p.section.Check(c, pr, at.To(string(p.kind.Name)))
	}
}

// carries checks a profile of evidence that ties a vTPM to the hardware below it.
func (c *Checker) carries(pr *Profile, k *Kind, at Path) {
	other := pr.carrier()
	c.Demand(other.Name == k.Name, fmt.Sprintf("%s and %s are two kinds of machine", other.Name, k.Name), at...)
	if slices.Contains(k.Carries, attestation.TPM) {
		c.Demand(pr.TPM() != nil, "azure and svsm tie a vTPM to the hardware: a tpm section says what has to be in it", at...)
	}
}

// Values are reference values of one measurement.
type Values struct {
	Accept   []string `yaml:"accept"` // hex
	WarnOnly bool     `yaml:"warn_only,omitempty"`
	Source   string   `yaml:"source,omitempty"` // for people
}

func (v *Values) check(c *Checker, size int, at Path) {
	c.Demand(len(v.Accept) > 0, "empty: no value would be accepted", at.To("accept")...)
	c.Hexes(v.Accept, size, at.To("accept"))
	for m, value := range v.Accept {
		c.Demand(!unextended(value), "is what was never measured: it would prove nothing", at.To("accept", m)...)
	}
}

// Hexes demands lower-case hex of size bytes.
func (c *Checker) Hexes(values []string, size int, at Path) {
	for n, v := range values {
		if !isHex(v, size) {
			c.Fail("must be %d lower-case hex digits", []any{2 * size}, at.To(n)...)
		}
	}
}

// Filled demands values that say something: an empty one would fit a fact that is
// not there.
func (c *Checker) Filled(values []string, at Path) {
	for n, v := range values {
		c.Demand(v != "", "must not be empty", at.To(n)...)
	}
}

// OneOf demands values of a closed set.
func (c *Checker) OneOf(values, known []string, at Path) {
	for n, v := range values {
		if !slices.Contains(known, v) {
			c.Fail("%q is not known (hint: %s)", []any{v, hintOf(known)}, at.To(n)...)
		}
	}
}

// ListOrAny demands either a list or the explicit word that everything goes.
func (c *Checker) ListOrAny(list []string, anything bool, word string, at Path) {
	c.Demand((len(list) > 0) != anything, "must be a list, or else "+word+": true must say that any is meant", at...)
}

// Set is a number that must be there.
func (c *Checker) Set(n *uint64, most uint64, at Path) {
	if n == nil || *n > most {
		c.Fail("must be a number from 0 to %d", []any{most}, at...)
	}
}
