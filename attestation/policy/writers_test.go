package policy

import (
	"strings"
	"testing"
	"time"
)

func TestAGrantSaysWhoWrites(t *testing.T) {
	for text, want := range map[string]Decision{
		"":                                       {Writers: WritersOne, Lease: 2 * time.Minute},
		"    writers: one\n":                     {Writers: WritersOne, Lease: 2 * time.Minute},
		"    takeover: expiry\n    lease: 30s\n": {Writers: WritersOne, Lease: 30 * time.Second, Expiry: true},
		"    writers: many\n    lease: 24h\n":    {Writers: WritersMany, Lease: 24 * time.Hour},
	} {
		p := parse(t, strings.Replace(whole, "[open, format]\n", "[open, format]\n"+text, 1))
		a, err := appraise(t, p, nil)
		if err != nil {
			t.Fatal(err)
		}
		d, err := p.Authorize(a, Request{Volume: "data-1", Operation: Format})
		if err != nil || d.Writers != want.Writers || d.Lease != want.Lease || d.Expiry != want.Expiry {
			t.Errorf("%q: %+v, %v", text, d, err)
		}
	}
	for text, want := range map[string]string{
		"    writers: two\n":                        "is not known",
		"    writers: readers\n":                    "readers create no volume",
		"    takeover: operator\n":                  "is not known",
		"    writers: many\n    takeover: expiry\n": "no lease to take over",
		"    lease: 29s\n":                          "must be a duration",
		"    lease: 25h\n":                          "must be a duration",
		"    lease: soon\n":                         "must be a duration",
		"    lease: -2m\n":                          "must be a duration",
	} {
		_, err := Parse(Builtin(), "policy.yaml", []byte(strings.Replace(whole, "[open, format]\n", "[open, format]\n"+text, 1)))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	_, err := Parse(Builtin(), "policy.yaml", []byte(strings.Replace(whole, "[open, format]\n", "[open, clone]\n    writers: readers\n", 1)))
	if err == nil || !strings.Contains(err.Error(), "readers create no volume") {
		t.Errorf("readers who clone: %v", err)
	}
}

// Case 48: a grant for readers allows nobody to write, and another grant may.
func TestAGrantForReadersIsForReaders(t *testing.T) {
	p := parse(t, strings.Replace(whole, "[open, format]\n", "[open]\n    writers: readers\n", 1))
	a, err := appraise(t, p, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Authorize(a, Request{Volume: "data-1", Operation: Open})
	wantErr(t, err, ErrDenied)
	if d, err := p.Authorize(a, Request{Volume: "data-1", Operation: Open, ReadOnly: true}); err != nil || d.Writers != WritersReaders {
		t.Errorf("%+v, %v", d, err)
	}
}
