package policy

import (
	"strings"
	"testing"

	"github.com/keyagent/keyagent/attestation"
)

// ended is whole with an end, and a condition in its last line before it.
var ended = strings.Replace(whole, "version: 1\n", "version: 2\n", 1) + "    when: 'volume == \"data-1\"'\n...\n"

// Case 85: a write that was cut off, whose beginning says less of what is refused.
func TestABeginningOfAPolicyIsNone(t *testing.T) {
	if !strings.HasPrefix(ended, "version: 2\n") {
		t.Fatal("the test's policy has another version")
	}
	parse(t, ended)
	parse(t, strings.TrimSuffix(ended, "\n")) // nothing that counts is missing
	parse(t, ended+"\n\n")
	for n := range len(ended) - 1 {
		if _, err := Parse(Builtin(), "policy.yaml", []byte(ended[:n])); err == nil {
			t.Errorf("cut off after %d of %d bytes it is a policy: …%q", n, len(ended), ended[max(0, n-40):n])
		}
	}
	// Of version 1, some are; policy check says so.
	if advice := parse(t, whole).Advice(); len(advice) != 1 || !strings.Contains(advice[0], "cut off") {
		t.Errorf("advice: %q", advice)
	}
}

func TestWhatIsSeldomMeantIsPointedAt(t *testing.T) {
	for name, tt := range map[string]struct{ old, new, want string }{
		"PCR 16":               {"pcr: 4", "pcr: 16", "PCR 16, which any software"},
		"PCR 23":               {"pcr: 4", "pcr: 23", "PCR 23, which any software"},
		"a replica's profile":  {"grants:", "replicas: {profiles: [guest]}\ngrants:", `in replicas and in grant "data"`},
		"nothing that matters": {"", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.Replace(ended, tt.old, tt.new, 1)
			advice := strings.Join(parse(t, text).Advice(), "\n")
			if tt.want == "" && advice != "" || !strings.Contains(advice, tt.want) {
				t.Errorf("advice: %q", advice)
			}
		})
	}
	zero, one := uint64(0), uint64(1)
	for name, tt := range map[string]struct {
		section Section
		want    string
	}{
		"min_tcb of zeros": {&SNPProfile{MinTCB: &SNPTCB{Bootloader: &zero, TEE: &zero, SNP: &zero, Microcode: &zero}}, "min_tcb is zeros"},
		"one of them":      {&SNPProfile{MinTCB: &SNPTCB{Bootloader: &zero, TEE: &zero, SNP: &one, Microcode: &zero}}, ""},
		"min_svn of zeros": {&TDXProfile{MinSVN: &TDXSVN{TEETCB: strings.Repeat("0", 32), QE: &zero, PCE: &zero, TCBEvaluation: &zero}}, "min_svn is zeros"},
		"a module's":       {&TDXProfile{MinSVN: &TDXSVN{TEETCB: "05" + strings.Repeat("0", 30), QE: &zero}}, ""},
	} {
		kind := attestation.SNP
		if _, ok := tt.section.(*TDXProfile); ok {
			kind = attestation.TDX
		}
		var pr Profile
		pr.Set(kind, tt.section)
		p := &Policy{version: withEnd, profiles: []Profile{pr}}
		if got := strings.Join(p.Advice(), "\n"); tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q", name, got)
		}
	}
}
