package policy

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
)

// Differences collects how claims differ from one profile.
type Differences struct {
	profile    string
	claims     attestation.Claims
	hard, soft []Mismatch
}

// compare returns how verified claims differ from the profile: hard differences
// refuse, soft ones are only warned of.
func (pr *Profile) compare(v *attestation.Verified) (hard, soft []Mismatch) {
	d := &Differences{profile: pr.Name}
	for _, p := range pr.parts {
		c, ok := v.Claims(p.kind.Name)
		if !ok {
			d.Refuse("kind", []string{string(p.kind.Name)}, "none")
			continue
		}
		// A report that some other evidence carries covers something else than
		// the binder: what it proves is another thing.
		via := pr.via(p.kind.Name)
		if c.Via != via {
			d.Refuse(string(p.kind.Name)+".via", []string{how(via)}, how(c.Via))
			continue
		}
		d.claims = c
		p.section.Compare(d, c)
	}
	return d.hard, d.soft
}

func how(via attestation.Kind) string {
	if via == "" {
		return "evidence of its own"
	}
	return "carried by " + string(via) + " evidence"
}

func (d *Differences) Refuse(field string, expected []string, found string) {
	d.hard = append(d.hard, Mismatch{Profile: d.profile, Field: field, Expected: expected, Found: found})
}

// Trust demands a voucher of the list.
func (d *Differences) Trust(field string, names []string) {
	if !slices.Contains(names, d.claims.Trust) {
		d.Refuse(field, names, d.claims.Trust)
	}
}

// Values compares a measurement.
func (d *Differences) Values(field, register string, ref Values, events []attestation.Event) {
	got, ok := d.claims.Measurements[register]
	found := "not measured"
	if ok {
		found = hex.EncodeToString(got.Value)
	}
	// A register that nothing was measured into proves nothing, whatever list it
	// stands in.
	if ok && slices.Contains(ref.Accept, found) && !unextended(found) {
		return
	}
	m := Mismatch{Profile: d.profile, Field: field, Expected: ref.Accept, Found: found}
	if len(events) > 0 && len(got.Events) > 0 {
		m.Events = diffEvents(events, got.Events)
	}
	// Absence is never a matter of a warning.
	if ref.WarnOnly && ok {
		d.soft = append(d.soft, m)
	} else {
		d.hard = append(d.hard, m)
	}
}

// Text compares a fact with a list. The fact is "" where the field is all zero,
// and an empty list demands just that.
func (d *Differences) Text(field string, fact facts.Fact[string], accept []string) {
	got, ok := fact.Of(d.claims)
	switch {
	case !ok:
		d.Refuse(field, accept, "nothing")
	case len(accept) == 0 && got != "":
		d.Refuse(field, []string{"none, or one that the profile names"}, got)
	case len(accept) > 0 && !slices.Contains(accept, got):
		if got == "" {
			got = "none"
		}
		d.Refuse(field, accept, got)
	}
}

// Flag demands the value of a fact. A fact that is not there is refused.
func (d *Differences) Flag(field string, fact facts.Fact[bool], want bool) {
	got, ok := fact.Of(d.claims)
	switch {
	case !ok:
		d.Refuse(field, []string{strconv.FormatBool(want)}, "nothing")
	case got != want:
		d.Refuse(field, []string{strconv.FormatBool(want)}, strconv.FormatBool(got))
	}
}

// AtLeast demands a number of a minimum.
func (d *Differences) AtLeast(field string, fact facts.Fact[uint64], least uint64) {
	got, ok := fact.Of(d.claims)
	switch {
	case !ok:
		d.Refuse(field, []string{fmt.Sprintf("at least %d", least)}, "nothing")
	case got < least:
		d.Refuse(field, []string{fmt.Sprintf("at least %d", least)}, strconv.FormatUint(got, 10))
	}
}

// Bits demands that all of these bits are set.
func (d *Differences) Bits(field string, fact facts.Fact[uint64], want uint64) {
	if want == 0 {
		return
	}
	got, ok := fact.Of(d.claims)
	switch {
	case !ok:
		d.Refuse(field, []string{fmt.Sprintf("all bits of %#x", want)}, "nothing")
	case got&want != want:
		d.Refuse(field, []string{fmt.Sprintf("all bits of %#x", want)}, fmt.Sprintf("%#x", got))
	}
}

// weakness is a property that is refused unless the profile's allow list names it.
type weakness struct {
	word string // in the allow list
	fact facts.Fact[bool]
	safe bool // the fact's value without the weakness
}

func words(all []weakness) []string {
	var out []string
	for _, w := range all {
		out = append(out, w.word)
	}
	return out
}

func (d *Differences) weaknesses(section string, all []weakness, allow []string) {
	for _, w := range all {
		if !slices.Contains(allow, w.word) {
			d.Flag(section+"."+w.word, w.fact, w.safe)
		}
	}
}

func unextended(hexValue string) bool {
	return strings.Trim(hexValue, "0") == "" || strings.Trim(hexValue, "f") == ""
}
