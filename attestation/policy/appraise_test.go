package policy

import (
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation"
)

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

// claims are those that the whole policy accepts.
func claims() attestation.Claims {
	return attestation.Claims{
		Kind: attestation.TPM, Identity: ek, Trust: "enrolled:rack-7", Epoch: "1",
		Measurements: map[string]attestation.Measurement{"pcr4": {Value: unhex(good4)}, "pcr7": {Value: unhex(good7)}},
		Facts:        map[string]any{"event_log": true, "reset_count": uint64(3), "firmware": "0x1"},
	}
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

func verified(t testing.TB, c ...attestation.Claims) *attestation.Verified {
	t.Helper()
	v, err := attestation.NewVerified(attestation.Binder{}, time.Unix(0, 0), c...)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func appraise(t testing.TB, p *Policy, change func(*attestation.Claims)) (*Appraisal, error) {
	t.Helper()
	c := claims()
	if change != nil {
		change(&c)
	}
	return p.Appraise(verified(t, c))
}

func TestEvidenceThatFitsIsAccepted(t *testing.T) {
	p := parse(t, whole)
	a, err := appraise(t, p, nil)
	if err != nil || a.Profile != "guest" || len(a.Warnings) != 0 {
		t.Fatalf("%+v, %v", a, err)
	}
	if p.Lifetime() != 15*time.Minute || !slices.Equal(p.PCRs(), []uint32{4, 7}) {
		t.Errorf("lifetime %s, PCRs %v", p.Lifetime(), p.PCRs())
	}
	d, err := p.Authorize(a, Request{Volume: "data-1", Operation: Open, Now: time.Unix(0, 0)})
	if err != nil || d.Grant != "data" || d.PolicyHash != p.Hash() {
		t.Errorf("%+v, %v", d, err)
	}
}

// Each field by itself: the refusal is of that field, with what was found.
func TestEachFieldThatDiffersIsNamed(t *testing.T) {
	for name, tt := range map[string]struct {
		change       func(*attestation.Claims)
		field, found string
	}{
		"trust":    {func(c *attestation.Claims) { c.Trust = "root:other" }, "trust", "root:other"},
		"no trust": {func(c *attestation.Claims) { c.Trust = "" }, "trust", ""},
		"no event log": {func(c *attestation.Claims) { c.Facts["event_log"] = false },
			"event_log", "none"},
		"no facts": {func(c *attestation.Claims) { c.Facts = nil }, "event_log", "none"},
		"pcr4":     {func(c *attestation.Claims) { c.Measurements["pcr4"] = attestation.Measurement{Value: unhex(good7)} }, "pcr4", good7},
		"one bit":  {func(c *attestation.Claims) { c.Measurements["pcr7"].Value[31] ^= 1 }, "pcr7", good7[:62] + "76"},
		"a prefix": {func(c *attestation.Claims) {
			c.Measurements["pcr7"] = attestation.Measurement{Value: unhex(good7[:62])}
		}, "pcr7", good7[:62]},
		"empty":     {func(c *attestation.Claims) { c.Measurements["pcr7"] = attestation.Measurement{} }, "pcr7", ""},
		"no pcr7":   {func(c *attestation.Claims) { delete(c.Measurements, "pcr7") }, "pcr7", "not measured"},
		"zero":      {func(c *attestation.Claims) { c.Measurements["pcr7"] = attestation.Measurement{Value: make([]byte, 32)} }, "pcr7", zeros},
		"all ones":  {func(c *attestation.Claims) { c.Measurements["pcr7"] = attestation.Measurement{Value: unhex(ones)} }, "pcr7", ones},
		"not a TPM": {func(c *attestation.Claims) { c.Kind = "other" }, "kind", "none"},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := appraise(t, parse(t, whole), tt.change)
			wantErr(t, err, ErrMismatch)
			wantErr(t, err, attestation.ErrRefused)
			var m *MismatchError
			if !errors.As(err, &m) || len(m.Mismatches) != 1 || m.Mismatches[0].Field != tt.field || m.Mismatches[0].Found != tt.found || a != nil {
				t.Fatalf("%v, %+v", err, m)
			}
			if m.Profile != "guest" || m.PeerDetail() != "" {
				t.Errorf("profile %q, shown to the machine: %q", m.Profile, m.PeerDetail())
			}
			if !strings.Contains(err.Error(), tt.field+": expected") {
				t.Errorf("the text does not say it: %v", err)
			}
		})
	}
}

func TestTheMachineSeesTheDifferenceOnlyIfItsProfileShowsIt(t *testing.T) {
	shown := strings.Replace(whole, "name: guest\n", "name: guest\n    show_mismatch: true\n", 1)
	for text, want := range map[string]bool{whole: false, shown: true} {
		_, err := appraise(t, parse(t, text), func(c *attestation.Claims) { c.Trust = "root:other" })
		var m *MismatchError
		if !errors.As(err, &m) || (m.PeerDetail() != "") != want {
			t.Errorf("shown %q, want %v", m.PeerDetail(), want)
		}
	}
}

func TestWarnOnlyWarnsOfOneRegisterAndOfNothingElse(t *testing.T) {
	text := strings.Replace(whole, good7+"]", good7+"]\n          warn_only: true", 1)
	p := parse(t, text)
	a, err := appraise(t, p, func(c *attestation.Claims) { c.Measurements["pcr7"].Value[0] ^= 1 })
	if err != nil || len(a.Warnings) != 1 || a.Warnings[0].Field != "pcr7" {
		t.Fatalf("%+v, %v", a, err)
	}
	if d, err := p.Authorize(a, Request{Volume: "data-1", Operation: Open}); err != nil || len(d.Warnings) != 1 {
		t.Errorf("%+v, %v", d, err)
	}
	for name, change := range map[string]func(*attestation.Claims){
		"it was not quoted": func(c *attestation.Claims) { delete(c.Measurements, "pcr7") },
		"another register":  func(c *attestation.Claims) { c.Measurements["pcr4"].Value[0] ^= 1 },
		"the trust":         func(c *attestation.Claims) { c.Trust = "root:other" },
		"the event log":     func(c *attestation.Claims) { c.Facts["event_log"] = false },
	} {
		if _, err := appraise(t, p, change); !errors.Is(err, ErrMismatch) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Case 26.
func TestARegisterThatWasNeverExtendedIsRefused(t *testing.T) {
	zero := func(c *attestation.Claims) { c.Measurements["pcr7"] = attestation.Measurement{Value: make([]byte, 32)} }
	allowed := strings.Replace(whole, good7+"]", `"`+zeros+"\"]\n          allow_unextended: true", 1)
	if _, err := appraise(t, parse(t, allowed), zero); err != nil {
		t.Errorf("it is allowed by name: %v", err)
	}
	if _, err := appraise(t, parse(t, allowed), nil); !errors.Is(err, ErrMismatch) {
		t.Errorf("and no other value: %v", err)
	}
	// Should a policy ever come about without its check, the appraisal still refuses.
	p := parse(t, allowed)
	p.profiles[0].TPM().PCRs[1].AllowUnextended = false
	_, err := appraise(t, p, zero)
	wantErr(t, err, ErrMismatch)
}

func TestTheClosestOfSeveralProfilesIsReported(t *testing.T) {
	profile := whole[strings.Index(whole, "  - name: guest"):strings.Index(whole, "grants:")]
	far := strings.NewReplacer("name: guest", "name: far", good4, strings.Repeat("aa", 32), good7, strings.Repeat("bb", 32)).Replace(profile)
	p := parse(t, strings.Replace(whole, profile, far+profile, 1))
	if a, err := appraise(t, p, nil); err != nil || a.Profile != "guest" {
		t.Errorf("%+v, %v", a, err)
	}
	_, err := appraise(t, p, func(c *attestation.Claims) { c.Measurements["pcr7"].Value[0] ^= 1 })
	var m *MismatchError
	if !errors.As(err, &m) || m.Profile != "guest" {
		t.Errorf("closest is %+v", m)
	}
	if _, err := (&Policy{}).Appraise(verified(t, claims())); !errors.Is(err, ErrMismatch) {
		t.Errorf("a policy of nothing: %v", err)
	}
}

func event(name, digest string) attestation.Event {
	return attestation.Event{Type: "EV_IPL", Name: name, Digest: digest}
}

// Show 1: a word more on the kernel's command line is named as that.
func TestTheEventsThatDifferAreNamed(t *testing.T) {
	want := []attestation.Event{event("firmware", "f0"), event("Secure Boot db", "d0"), event("kernel (.linux)", "e0"),
		event("kernel command line (.cmdline)", "c0"), event("initrd (.initrd)", "10"), event("end", "00")}
	with := func(i int, digest string) []attestation.Event {
		out := slices.Clone(want)
		out[i].Digest, out[i].Seq = digest, i+1
		return out
	}
	for name, tt := range map[string]struct {
		got  []attestation.Event
		want []string
	}{
		"nothing differs":     {want, nil},
		"kernel command line": {with(3, "c1"), []string{"event #4 kernel command line (.cmdline) (EV_IPL): expected c0, found c1"}},
		"initrd":              {with(4, "11"), []string{"event #5 initrd (.initrd) (EV_IPL): expected 10, found 11"}},
		"Secure Boot db":      {with(1, "d1"), []string{"event #2 Secure Boot db (EV_IPL): expected d0, found d1"}},
		"one is missing":      {slices.Delete(slices.Clone(want), 4, 5), []string{"initrd (.initrd) (EV_IPL) is missing: expected 10"}},
		"one is new":          {slices.Insert(slices.Clone(want), 2, event("option ROM", "99")), []string{"option ROM (EV_IPL) was not expected: found 99"}},
		"nothing was measured": {nil, []string{"firmware (EV_IPL) is missing: expected f0", "Secure Boot db (EV_IPL) is missing: expected d0",
			"kernel (.linux) (EV_IPL) is missing: expected e0", "kernel command line (.cmdline) (EV_IPL) is missing: expected c0",
			"initrd (.initrd) (EV_IPL) is missing: expected 10", "end (EV_IPL) is missing: expected 00"}},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, d := range diffEvents(want, tt.got) {
				got = append(got, d.String())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	text := func(name, digest, detail string) []attestation.Event {
		return []attestation.Event{{Type: "EV_IPL", Name: name, Digest: digest, Detail: detail}}
	}
	for name, tt := range map[string]struct {
		want, got []attestation.Event
		says      string
	}{
		"both sides have the text": {text("kernel command line, by GRUB", "c0", "quiet root=/dev/a ro"), text("kernel command line, by GRUB", "c1", "root=/dev/b ro debug"),
			"kernel command line, by GRUB (EV_IPL): expected c0, found c1; words missing: quiet root=/dev/a; words added: root=/dev/b debug"},
		"the profile has it": {text("kernel command line (.cmdline)", "c0", "quiet"), text("kernel command line (.cmdline)", "c1", ""),
			"kernel command line (.cmdline) (EV_IPL): expected c0, found c1; expected text: quiet"},
		"no command line": {text("EFI application", "c0", "shim"), text("EFI application", "c1", "PciRoot(0x0)"), "EFI application (EV_IPL): expected c0, found c1"},
	} {
		if got := diffEvents(tt.want, tt.got); len(got) != 1 || got[0].String() != tt.says {
			t.Errorf("%s: %v", name, got)
		}
	}
	endless := slices.Repeat([]attestation.Event{event("x", "99")}, 8192)
	if n := len(diffEvents(want, endless)); n != maxDiff {
		t.Errorf("%d differences are reported", n)
	}
}

// A register whose log does not lead to its value is the policy's to refuse: the
// value is the quote's all the same.
func TestTheLogOfEachRegisterIsDemandedByItself(t *testing.T) {
	unexplained := func(c *attestation.Claims) {
		m := c.Measurements["pcr4"]
		m.Events, m.Unexplained = nil, "the log leads elsewhere"
		c.Measurements["pcr4"] = m
	}
	field := func(log, register string) string {
		return strings.NewReplacer("event_log: required", "event_log: "+log, "- pcr: 4", "- pcr: 4\n          "+register).Replace(whole)
	}
	for _, tt := range []struct {
		name, file string
		change     func(*attestation.Claims)
		refused    bool
	}{
		{"required of the TPM", whole, unexplained, true},
		{"required of the TPM, and optional of the register", field("required", "event_log: optional"), unexplained, false},
		{"optional of the TPM", field("optional", "warn_only: false"), unexplained, false},
		{"optional of the TPM, and required of the register", field("optional", "event_log: required"), unexplained, true},
		{"required of a register without events", field("optional", "event_log: required"), func(c *attestation.Claims) {
			c.Measurements["pcr4"] = attestation.Measurement{Value: c.Measurements["pcr4"].Value}
		}, true},
		{"a log that cannot be read", whole, func(c *attestation.Claims) {
			c.Facts["event_log"], c.Facts["event_log_error"] = false, "the log has SHA-1 alone"
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := appraise(t, parse(t, tt.file), tt.change)
			if refused := errors.Is(err, ErrMismatch); refused != tt.refused {
				t.Fatal(err)
			}
			var m *MismatchError
			if errors.As(err, &m) && (!strings.HasSuffix(m.Mismatches[0].Field, "event_log") || m.Mismatches[0].Found == "none") {
				t.Errorf("%+v does not say why", m.Mismatches)
			}
		})
	}
	if _, err := Parse(Builtin(), "policy.yaml", []byte(field("required", "event_log: maybe"))); err == nil {
		t.Error("a register's event_log of another word is taken")
	}
}

// The profile of a machine whose log does not lead to a register accepts that
// machine, and says so of that register alone.
func TestReferenceValuesOfARegisterThatNoLogExplains(t *testing.T) {
	c := claims()
	m := c.Measurements["pcr4"]
	m.Events, m.Unexplained = nil, "its log leads elsewhere"
	c.Measurements["pcr4"] = m
	p, err := Reference(Builtin(), "machine", "evidence", []attestation.Claims{c})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range p.TPM().PCRs {
		if want := map[bool]string{true: "optional"}[*r.PCR == 4]; r.EventLog != want || strings.Contains(r.Source, "leads elsewhere") != (*r.PCR == 4) {
			t.Errorf("pcr %d: %+v", *r.PCR, r)
		}
	}
	if hard, _ := p.compare(verified(t, c)); len(hard) > 0 {
		t.Errorf("the machine does not fit its own values: %v", hard)
	}
}

// Who is a key service beside this one is said by name, of this policy, and fits without a doubt.
func TestAReplicaIsOneByName(t *testing.T) {
	listed := strings.Replace(whole, "grants:", "replicas: {profiles: [guest]}\ngrants:", 1)
	p := parse(t, listed)
	a, err := appraise(t, p, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AuthorizeReplica(a); err != nil {
		t.Error(err)
	}
	other := parse(t, whole)
	mine, err := appraise(t, other, nil)
	if err != nil {
		t.Fatal(err)
	}
	warned := parse(t, strings.Replace(listed, good7+"]", good7+"]\n          warn_only: true", 1))
	almost, err := appraise(t, warned, func(c *attestation.Claims) { c.Measurements["pcr7"].Value[0] ^= 1 })
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"a policy without replicas":   other.AuthorizeReplica(mine),
		"an appraisal of another one": other.AuthorizeReplica(a),
		"no appraisal":                p.AuthorizeReplica(nil),
		"one with a warning":          warned.AuthorizeReplica(almost),
	} {
		if !errors.Is(err, ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A machine that fits an earlier profile too is a replica all the same; one that fits only that
// is none.
func TestAReplicaMayFitAnotherProfileToo(t *testing.T) {
	_, after, _ := strings.Cut(whole, "profiles:\n")
	block, _, _ := strings.Cut(after, "grants:")
	two := strings.Replace(whole, "profiles:\n", "profiles:\n"+strings.Replace(block, "name: guest", "name: any", 1), 1)
	p := parse(t, strings.Replace(two, "grants:", "replicas: {profiles: [guest]}\ngrants:", 1))
	v := verified(t, claims())
	if a, err := p.Appraise(v); err != nil || a.Profile != "any" {
		t.Fatalf("%+v, %v", a, err)
	}
	a, err := p.AppraiseReplica(v)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AuthorizeReplica(a); err != nil {
		t.Error(err)
	}
	strict := parse(t, strings.Replace(strings.Replace(two, "grants:", "replicas: {profiles: [any]}\ngrants:", 1), good7, strings.Repeat("0d", 32), 1))
	if a, err = strict.AppraiseReplica(v); err != nil {
		t.Fatal(err)
	}
	if err := strict.AuthorizeReplica(a); !errors.Is(err, ErrDenied) {
		t.Errorf("profile %q: %v", a.Profile, err)
	}
}
