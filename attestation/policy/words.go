package policy

import (
	"slices"
	"strings"
)

// isCommandLine reports whether an event's text is made of words that count.
func (d EventDiff) isCommandLine() bool {
	return strings.Contains(d.Name, "command line") || d.Name == "GRUB command"
}

// Words returns the words of the expected text that the machine's has not, and
// those that only the machine's has, each in its order. Without a text on both
// sides there are none. Neither text is proved: the digests are what differs.
func (d EventDiff) Words() (missing, added []string) {
	if !d.isCommandLine() || d.ExpectedDetail == "" || d.Detail == "" {
		return nil, nil
	}
	want, got := strings.Fields(d.ExpectedDetail), strings.Fields(d.Detail)
	return without(want, got), without(got, want)
}

// without returns the words of a that b has not, or has less often.
func without(a, b []string) []string {
	b = slices.Clone(b)
	var out []string
	for _, w := range a {
		if n := slices.Index(b, w); n >= 0 {
			b = slices.Delete(b, n, n+1)
		} else {
			out = append(out, w)
		}
	}
	return out
}

// inWords is what a person is told of two texts.
func (d EventDiff) inWords() string {
	missing, added := d.Words()
	var out []string
	if len(missing) > 0 {
		out = append(out, "words missing: "+strings.Join(missing, " "))
	}
	if len(added) > 0 {
		out = append(out, "words added: "+strings.Join(added, " "))
	}
	if d.isCommandLine() && d.ExpectedDetail != "" && d.Detail == "" {
		out = append(out, "expected text: "+d.ExpectedDetail)
	}
	return strings.Join(out, "; ")
}
