package systemd_test

import (
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/systemd"
)

// exposed is what systemd-analyze security may at most say of a unit, from 0 to 10. The
// agent mounts for the whole machine, which rules out each setting that needs a mount
// namespace, and has the capabilities for it.
var exposed = map[string]float64{"keyagent-serve.service": 1.1, "keyagent-kubekms.service": 1.2, "keyagent-agent.service": 4.8, "keyagent-csi-proxy.service": 3.7}

// comments are a unit's, without the ends of lines.
func comments(text []byte) string {
	var out []string
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") {
			out = append(out, strings.Fields(line[1:])...)
		}
	}
	return strings.Join(out, " ")
}

// A sandbox is as tight as it was, and what is left out of it is explained in the unit.
func TestTheSandboxesAreAsTightAsTheyWere(t *testing.T) {
	dir := t.TempDir()
	if err := os.CopyFS(dir, systemd.Units); err != nil {
		t.Fatal(err)
	}
	for unit, most := range exposed {
		path := filepath.Join(dir, "units", unit)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		analyze := func(more ...string) []byte {
			t.Helper()
			out, err := exec.Command("systemd-analyze", append(append([]string{"security", "--offline=true", "--no-pager"}, more...), path)...).Output()
			if err != nil {
				t.Fatalf("systemd-analyze: %v (hint: make deps)", err)
			}
			return out
		}
		m := regexp.MustCompile(`: ([0-9.]+) [A-Z]+`).FindSubmatch(analyze())
		if m == nil {
			t.Fatalf("%s: no figure", unit)
		}
		score, err := strconv.ParseFloat(string(m[1]), 64)
		t.Logf("%s: %.1f", unit, score)
		if err != nil || score > most {
			t.Errorf("%s has an exposure of %s, at most %.1f is allowed", unit, m[1], most)
		}
		var settings []struct{ Name, Exposure string }
		if err := json.Unmarshal(analyze("--json=short"), &settings); err != nil || len(settings) < 50 {
			t.Fatalf("%d settings, %v", len(settings), err)
		}
		said, missing := comments(text), 0
		for _, s := range settings {
			if s.Exposure == "" {
				continue
			}
			// RootDirectory=/RootImage=, CapabilityBoundingSet=~CAP_SYS_ADMIN
			name, _, _ := strings.Cut(s.Name, "=")
			if !strings.Contains(said, name) && !strings.Contains(string(text), "\n"+name+"=") {
				t.Errorf("%s: %s is left out (%s), and no comment says why", unit, s.Name, s.Exposure)
			}
			missing++
		}
		if missing == 0 {
			t.Errorf("%s: nothing is left out?", unit)
		}
	}
}

// A unit never ends in a shell or in a reboot, is stopped when the machine is, and the
// agent is in nobody's way who needs no key.
func TestTheAgentsPlaceInTheBootIsSaid(t *testing.T) {
	text, err := fs.ReadFile(systemd.Units, "units/keyagent-agent.service")
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		key, values, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok || strings.HasPrefix(key, "#") {
			continue
		}
		for _, v := range strings.Fields(values) {
			have[key+"="+v] = true
		}
	}
	for _, want := range []string{
		"DefaultDependencies=no", "Conflicts=shutdown.target", "Before=shutdown.target", "Before=remote-cryptsetup.target", "Before=remote-fs.target",
		"After=network-online.target", "Wants=network-online.target", "Type=notify", "WatchdogSec=2min", "FailureAction=none", "StartLimitIntervalSec=0",
	} {
		if !have[want] {
			t.Errorf("%s is missing", want)
		}
	}
	for _, no := range []string{"OnFailure=", "RequiredBy=", "Before=cryptsetup-pre.target", "Before=local-fs.target", "Before=sysinit.target", "Before=basic.target"} {
		for got := range have {
			if strings.HasPrefix(got, no) {
				t.Errorf("%s", got)
			}
		}
	}
}
