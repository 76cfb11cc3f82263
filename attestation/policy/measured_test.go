package policy

import (
	"slices"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/attestation"
)

const (
	rootDigest = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	dataDigest = "dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd"
	newDigest  = "0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d"
)

func demanding(list string) string {
	return strings.Replace(whole, "      pcrs:\n", "      measured_volumes: ["+list+"]\n      pcrs:\n", 1)
}

// A profile may demand volumes that were opened before, in whatever order, and whatever
// else was measured beside them.
func TestAProfileDemandsVolumesThatWereOpened(t *testing.T) {
	p := parse(t, demanding("{volume: root, accept: ["+rootDigest+"]}, {volume: data, accept: ["+dataDigest+", "+newDigest+"]}"))
	if !slices.Equal(p.PCRs(), []uint32{4, 7, 15}) {
		t.Errorf("registers %v are asked for", p.PCRs())
	}
	event := func(digest string) attestation.Event { return attestation.Event{Type: "systemd", Digest: digest} }
	for _, tt := range []struct {
		name   string
		pcr15  *attestation.Measurement
		refuse []string
	}{
		{"both", &attestation.Measurement{Value: unhex(good4), Events: []attestation.Event{event(rootDigest), event(dataDigest)}}, nil},
		{"another order, a new key, and something else", &attestation.Measurement{Value: unhex(good4),
			Events: []attestation.Event{event(newDigest), event(good7), event(rootDigest)}}, nil},
		{"one of them", &attestation.Measurement{Value: unhex(good4), Events: []attestation.Event{event(rootDigest)}}, []string{"measured_volumes.data"}},
		{"another disk", &attestation.Measurement{Value: unhex(good4), Events: []attestation.Event{event(good4), event(good7)}},
			[]string{"measured_volumes.root", "measured_volumes.data"}},
		{"a value that no log leads to", &attestation.Measurement{Value: unhex(good4), Unexplained: "leads elsewhere"},
			[]string{"measured_volumes.root", "measured_volumes.data"}},
		{"a value and no log", &attestation.Measurement{Value: unhex(good4)}, []string{"measured_volumes.root", "measured_volumes.data"}},
		{"nothing measured", &attestation.Measurement{Value: unhex(zeros)}, []string{"measured_volumes.root", "measured_volumes.data"}},
		{"no such register", nil, []string{"measured_volumes.root", "measured_volumes.data"}},
	} {
		c := claims()
		if tt.pcr15 != nil {
			c.Measurements["pcr15"] = *tt.pcr15
		}
		hard, soft := p.profiles[0].compare(verified(t, c))
		var got []string
		for _, m := range hard {
			got = append(got, m.Field)
			if len(m.Expected) == 0 || m.Found == "" {
				t.Errorf("%s: %+v", tt.name, m)
			}
		}
		if !slices.Equal(got, tt.refuse) || len(soft) > 0 {
			t.Errorf("%s: %v and %v", tt.name, hard, soft)
		}
	}
}

func TestAMeasuredVolumeIsDescribedInFull(t *testing.T) {
	for list, want := range map[string]string{
		"{volume: root}":                                     "no digest would be accepted",
		"{volume: root, accept: []}":                         "no digest would be accepted",
		"{volume: root, accept: [ab]}":                       "lower-case hex digits",
		"{accept: [" + rootDigest + "]}":                     "must be a volume's ID",
		"{volume: \"r*\", accept: [" + rootDigest + "]}":     "must be a volume's ID",
		"{volume: root, warn_only: true}":                    "warn_only",
		strings.Repeat("{volume: r, accept: ["+ek+"]}, ", 2): "is named twice",
	} {
		if _, err := Parse(Builtin(), "policy.yaml", []byte(demanding(list))); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", list, err)
		}
	}
}
