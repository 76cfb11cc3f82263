package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation"
)

// section is a profile's part about one kind of claims.
type section interface {
	kind() attestation.Kind
	// check says whether the section is good, when the file is read.
	check(c *checker, pr *Profile, at path)
	// compare returns how verified claims differ from the section.
	compare(d *differences, claims attestation.Claims)
}

// path is a place in the policy file.
type path []any

func (p path) to(more ...any) path { return append(slices.Clone(p), more...) }

// sections returns those that are there.
func (pr *Profile) sections() []section {
	var all []section
	if pr.Azure != nil {
		all = append(all, pr.Azure)
	}
	if pr.SVSM != nil {
		all = append(all, pr.SVSM)
	}
	if pr.SNP != nil {
		all = append(all, pr.SNP)
	}
	if pr.TDX != nil {
		all = append(all, pr.TDX)
	}
	if pr.Nitro != nil {
		all = append(all, pr.Nitro)
	}
	if pr.TPM != nil {
		all = append(all, pr.TPM)
	}
	return all
}

// carrier is the kind of evidence that brings the profile's hardware and TPM
// claims together, or empty if each brings its own.
func (pr *Profile) carrier() attestation.Kind {
	switch {
	case pr.Azure != nil:
		return attestation.Azure
	case pr.SVSM != nil:
		return attestation.SVSM
	}
	return ""
}

// carried reports whether the claims of a kind come in another's evidence.
func (pr *Profile) carried(k attestation.Kind) bool {
	return pr.carrier() != "" && k != pr.carrier() && k != attestation.Nitro
}

// Kinds returns the evidence that the profile demands.
func (pr *Profile) Kinds() []attestation.Kind {
	var kinds []attestation.Kind
	for _, s := range pr.sections() {
		if !pr.carried(s.kind()) {
			kinds = append(kinds, s.kind())
		}
	}
	return kinds
}

// WarnOnly names the reference values that only warn, for people.
func (pr *Profile) WarnOnly() []string {
	var out []string
	add := func(soft bool, format string, args ...any) {
		if soft {
			out = append(out, pr.Name+" "+fmt.Sprintf(format, args...))
		}
	}
	if pr.TPM != nil {
		for _, r := range pr.TPM.PCRs {
			add(r.WarnOnly, "pcr%d", *r.PCR)
		}
	}
	if pr.Nitro != nil {
		for _, r := range pr.Nitro.PCRs {
			add(r.WarnOnly, "nitro.pcr%d", *r.PCR)
		}
	}
	if pr.TDX != nil {
		for _, r := range pr.TDX.RTMRs {
			add(r.WarnOnly, "tdx.rtmr%d", *r.RTMR)
		}
	}
	return out
}

// Allowed says in sentences which weaknesses the profile accepts by name, and
// whose machines it does not tell apart.
func (pr *Profile) Allowed() []string {
	var out []string
	add := func(section, anything string, open bool, allow []string) {
		if open {
			out = append(out, fmt.Sprintf("profile %q accepts %s (%s)", pr.Name, anything, section))
		}
		if len(allow) > 0 {
			out = append(out, fmt.Sprintf("profile %q accepts by name: %s (%s)", pr.Name, strings.Join(allow, ", "), section))
		}
	}
	if pr.SNP != nil {
		add("snp", "every chip", pr.SNP.AnyChip, pr.SNP.Allow)
	}
	if pr.TDX != nil {
		add("tdx", "every platform", pr.TDX.AnyPlatform, pr.TDX.Allow)
	}
	if pr.Azure != nil {
		add("azure", "every VM", pr.Azure.AnyVM, pr.Azure.Allow)
	}
	if pr.Nitro != nil {
		add("nitro", "every instance", pr.Nitro.AnyInstance, nil)
	}
	return out
}

// profile checks which sections come together, and each by itself.
func (c *checker) profile(pr *Profile, i int) {
	at := path{"profiles", i}
	switch {
	case pr.Azure != nil && pr.SVSM != nil:
		c.fail("azure and svsm are two kinds of machine", nil, at...)
	case pr.carrier() != "" && pr.TPM == nil:
		c.fail("azure and svsm tie a vTPM to the hardware: a tpm section says what has to be in it", nil, at...)
	case pr.Azure != nil && (pr.SNP == nil) == (pr.TDX == nil):
		c.fail("azure has either SNP or TDX below it: exactly one of snp and tdx must be there", nil, at.to("azure")...)
	case pr.SVSM != nil && (pr.SNP == nil || pr.TDX != nil):
		c.fail("an SVSM is below SNP: it needs an snp section and no tdx section", nil, at.to("svsm")...)
	case pr.SNP != nil && pr.TDX != nil:
		c.fail("no machine has both SNP and TDX", nil, at...)
	case pr.TPM == nil && pr.SNP == nil && pr.TDX == nil && pr.Nitro == nil:
		c.fail("no evidence is demanded: a profile needs a tpm, snp, tdx or nitro section", nil, at...)
	}
	for _, s := range pr.sections() {
		s.check(c, pr, at.to(string(s.kind())))
	}
}

// Values are reference values of one measurement.
type Values struct {
	Accept   []string `yaml:"accept"` // hex
	WarnOnly bool     `yaml:"warn_only,omitempty"`
	Source   string   `yaml:"source,omitempty"` // for people
}

func (v *Values) check(c *checker, size int, at path) {
	c.demand(len(v.Accept) > 0, "empty: no value would be accepted", at.to("accept")...)
	c.hexes(v.Accept, size, at.to("accept"))
	for m, value := range v.Accept {
		c.demand(!unextended(value), "is what was never measured: it would prove nothing", at.to("accept", m)...)
	}
}

// hexes demands lower-case hex of size bytes.
func (c *checker) hexes(values []string, size int, at path) {
	for n, v := range values {
		if !isHex(v, size) {
			c.fail("must be %d lower-case hex digits", []any{2 * size}, at.to(n)...)
		}
	}
}

// filled demands values that say something: an empty one would fit a fact that is
// not there.
func (c *checker) filled(values []string, at path) {
	for n, v := range values {
		c.demand(v != "", "must not be empty", at.to(n)...)
	}
}

// oneOf demands values of a closed set.
func (c *checker) oneOf(values, known []string, at path) {
	for n, v := range values {
		if !slices.Contains(known, v) {
			c.fail("%q is not known (hint: %s)", []any{v, hintOf(known)}, at.to(n)...)
		}
	}
}

// listOrAny demands either a list or the explicit word that everything goes.
func (c *checker) listOrAny(list []string, anything bool, word string, at path) {
	c.demand((len(list) > 0) != anything, "must be a list, or else "+word+": true must say that any is meant", at...)
}

// set is a number that must be there.
func (c *checker) set(n *uint64, most uint64, at path) {
	if n == nil || *n > most {
		c.fail("must be a number from 0 to %d", []any{most}, at...)
	}
}
