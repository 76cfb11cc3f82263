package failure

import (
	"errors"
	"fmt"
	"testing"
)

func TestAPersonIsToldOnce(t *testing.T) {
	refused := errors.New("evidence refused")
	for name, tt := range map[string]struct {
		err        error
		text, hint string
	}{
		"a class and a hint":          {New(NotFound, errors.New("no such volume"), "see keyagent status"), "not found: no such volume", "see keyagent status"},
		"the class in the error":      {New(EvidenceRefused, fmt.Errorf("%w: %w: no chip", refused, refused), ""), "evidence refused: no chip", ""},
		"of a configuration":          {New(Configuration, errors.New("invalid configuration: a.yaml: line 3"), ""), "configuration: a.yaml: line 3", ""},
		"a hint within":               {New(Usage, errors.New(`"x" is no list (hint: one, or (two)): see a`), "see --help"), `usage: "x" is no list: see a`, "one, or (two)"},
		"two of them":                 {New(Usage, errors.New("a (hint: first), b (hint: second)"), ""), "usage: a, b", "first"},
		"one that does not end":       {New(Usage, errors.New("a (hint: first"), "the other"), "usage: a (hint: first", "the other"},
		"without a class":             {errors.New("a"), string(Internal) + ": a", ""},
		"the class later in the text": {New(EvidenceRefused, errors.New("key service: evidence refused by the peer"), ""), "evidence refused: key service: evidence refused by the peer", ""},
	} {
		if text, hint := Describe(tt.err); text != tt.text || hint != tt.hint {
			t.Errorf("%s: %q, %q", name, text, hint)
		}
	}
}

func FuzzDescribe(f *testing.F) {
	f.Add("a (hint: b (c)) d", "hint")
	f.Add("(hint: ", "")
	f.Fuzz(func(t *testing.T, text, hint string) {
		Describe(New(Usage, errors.New(text), hint))
	})
}
