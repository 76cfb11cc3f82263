package policy

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Case 31.
func TestVolumeIDs(t *testing.T) {
	for _, id := range []string{"data", "data-1", "A", "0", "a.b_c-d", strings.Repeat("a", 128)} {
		if !ValidVolume(id) {
			t.Errorf("%q is refused", id)
		}
	}
	for _, id := range []string{"", ".", "..", "a..b", "-a", ".a", "_a", "a/b", "/a", "a\\b", "a b", "a\n", "\na", "a\x00", "a\x00b", "a*", "*",
		"dаta", "data\u200b", "ｄata", "ä", "\xff", strings.Repeat("a", 129), strings.Repeat("a", 1<<20)} {
		if ValidVolume(id) {
			t.Errorf("%q is a volume ID", id[:min(len(id), 40)])
		}
	}
}

func TestPatterns(t *testing.T) {
	for _, tt := range []struct {
		pattern string
		yes, no []string
	}{
		{"data", []string{"data"}, []string{"data-1", "dat", "Data", ""}},
		{"data-*", []string{"data-1", "data-"}, []string{"data", "other-data-1", "DATA-1"}},
		{"*", []string{"x", ""}, nil},
		{"*-data", []string{"a-data", "-data"}, []string{"data", "a-data-"}},
		{"a*b*c", []string{"abc", "axbxc", "abbcc", "abcbc"}, []string{"acb", "ab", "abcd"}},
		{"a*a", []string{"aa", "aba"}, []string{"a"}},
		{"t1.*.x", []string{"t1.a.x", "t1.a.b.x"}, []string{"t1xa.x", "t1.x"}},
		{"a.b", []string{"a.b"}, []string{"aab"}},
	} {
		for _, id := range tt.yes {
			if !Match(tt.pattern, id) {
				t.Errorf("%q does not cover %q", tt.pattern, id)
			}
		}
		for _, id := range tt.no {
			if Match(tt.pattern, id) {
				t.Errorf("%q covers %q", tt.pattern, id)
			}
		}
	}
}

// A pattern of many stars is no work for an attacker who chooses the volume.
func TestAPatternOfManyStarsIsCheap(t *testing.T) {
	started := time.Now()
	for range 1000 {
		Match(strings.Repeat("a*", 60)+"b", strings.Repeat("a", 128))
	}
	if took := time.Since(started); took > 5*time.Second {
		t.Errorf("1000 matches took %s", took)
	}
}

func request(p *Policy, a *Appraisal, volume string, op Operation) error {
	_, err := p.Authorize(a, Request{Volume: volume, Operation: op, Now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)})
	return err
}

func TestAGrantAllowsWhatItNames(t *testing.T) {
	p := parse(t, strings.Replace(whole, "[open, format]", "[open]", 1))
	a, err := appraise(t, p, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := request(p, a, "data-1", Open); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{
		"an operation that it does not name": request(p, a, "data-1", Format),
		"an operation that does not exist":   request(p, a, "data-1", "erase"),
		"no operation":                       request(p, a, "data-1", ""),
		"another tenant's volume":            request(p, a, "other-1", Open),
		"no volume":                          request(p, a, "", Open),
		"a path":                             request(p, a, "data-../x", Open),
		"no appraisal":                       request(p, nil, "data-1", Open),
		"an appraisal by another policy":     request(parse(t, whole), a, "data-1", Open),
		"another profile":                    request(p, &Appraisal{Profile: "host", policy: p}, "data-1", Open),
	} {
		t.Run(name, func(t *testing.T) { wantErr(t, err, ErrDenied) })
	}
}

func TestExpressions(t *testing.T) {
	for when, allowed := range map[string]bool{
		"true":  true,
		"false": false,
		`volume == "data-1" && operation == "open" && profile == "guest"`: true,
		`trust == "enrolled:rack-7" && identity.startsWith("eeee")`:       true,
		`tpm.reset_count < 10u`:                        true,
		`tpm.reset_count > 10u`:                        false,
		`now < timestamp("2026-06-01T00:00:00Z")`:      true,
		`now > timestamp("2026-06-01T00:00:00Z")`:      false,
		`tpm.no_such_fact == 1`:                        false, // an error allows nothing
		`tpm.firmware > 1`:                             false,
		`1u/(tpm.reset_count - tpm.reset_count) == 1u`: false,
		`tpm.event_log == true`:                        true,
		`size(volume.replace("a", "b")) > 0 || true`:   false,
		`[1,2,3,4,5,6,7,8,9].all(a, [1,2,3,4,5,6,7,8,9].all(b, [1,2,3,4,5,6,7,8,9].all(c, [1,2,3,4,5,6,7,8,9].all(d, [1,2,3,4,5,6,7,8,9].all(e, a+b+c+d+e > 0)))))`: false,
	} {
		text := strings.Replace(whole, "[open, format]\n", "[open, format]\n    when: '"+when+"'\n", 1)
		if strings.Contains(when, "replace") {
			if _, err := Parse(Builtin(), "policy.yaml", []byte(text)); err == nil {
				t.Errorf("%s: a function that is not there compiles", when)
			}
			continue
		}
		p := parse(t, text)
		a, err := appraise(t, p, nil)
		if err != nil {
			t.Fatal(err)
		}
		started := time.Now()
		err = request(p, a, "data-1", Open)
		if allowed && err != nil {
			t.Errorf("%s: %v", when, err)
		}
		if !allowed {
			wantErr(t, err, ErrDenied)
		}
		if took := time.Since(started); took > 5*time.Second {
			t.Errorf("%s took %s", when, took)
		}
	}
}

func TestAGrantThatFailsDoesNotStandInTheWayOfAnother(t *testing.T) {
	grant := whole[strings.Index(whole, "  - name: data"):]
	second := strings.NewReplacer("name: data", "name: more", `"data-*"`, `"*"`).Replace(grant) + "    adopts: [retired, data]\n"
	p := parse(t, strings.Replace(whole, grant, grant+"    when: \"false\"\n"+second, 1))
	a, err := appraise(t, p, nil)
	if err != nil {
		t.Fatal(err)
	}
	d, err := p.Authorize(a, Request{Volume: "data-1", Operation: Open})
	if err != nil || d.Grant != "more" || strings.Join(d.Owners, " ") != "more retired data" {
		t.Errorf("%+v, %v", d, err)
	}
}

func TestAFileThatIsTooLargeIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(path, []byte(whole+strings.Repeat("# more\n", 1<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(Builtin(), path); err == nil || !strings.Contains(err.Error(), "larger") {
		t.Errorf("%v", err)
	}
}

// FuzzPolicy: what is accepted allows nothing to a machine that it does not
// name, and names something in every list.
func FuzzPolicy(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte(strings.Replace(whole, "[open, format]\n", "[open]\n    when: volume == \"x\"\n    adopts: [old]\n", 1)))
	f.Add([]byte("a: &a [1]\nb: *a\n<<: {version: 1}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse(Builtin(), "/nonexistent/policy.yaml", data)
		if err != nil {
			return
		}
		vouchers := 0
		for _, t := range p.Trust() {
			vouchers += t.by.Vouchers()
		}
		if len(p.Profiles()) == 0 || len(p.Grants()) == 0 || p.Lifetime() < time.Second || vouchers == 0 {
			t.Fatalf("an empty policy is accepted: %+v", p)
		}
		for _, pr := range p.Profiles() {
			if len(pr.Kinds()) == 0 {
				t.Fatalf("profile %q demands no evidence", pr.Name)
			}
		}
		stranger := claims()
		stranger.Trust = "nobody"
		if _, err := p.Appraise(verified(t, stranger)); err == nil {
			t.Fatal("a stranger is accepted")
		}
		unmeasured := claims()
		unmeasured.Measurements = nil
		if _, err := p.Appraise(verified(t, unmeasured)); err == nil {
			t.Fatal("a machine without measurements is accepted")
		}
	})
}
