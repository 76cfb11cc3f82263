package crypttab

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestLinesOfKeyagentAreFound(t *testing.T) {
	lines := Parse([]byte("# data /dev/vdb none keyagent\n\n" +
		"data /dev/vdb none keyagent=node-1,_netdev\n" +
		"\tlogs  PARTLABEL=logs\t-  luks,keyagent,_netdev,nofail\r\n" +
		"plain /dev/vdc none luks\n" +
		"no-options /dev/vdc none\n" +
		"odd /dev/vdd none keyagent-fromat,luks # why\n" +
		"other /dev/vde none xkeyagent,key=keyagent\n" +
		"last /dev/vdf none keyagent"))
	var got []string
	for _, l := range lines {
		got = append(got, l.Name+" "+l.ID())
	}
	if want := []string{"data node-1", "logs logs", "odd odd", "last last"}; !slices.Equal(got, want) {
		t.Fatalf("%q", got)
	}
	if lines[0].Number != 3 || lines[1].Number != 4 || lines[3].Number != 9 || lines[0].More || !lines[2].More {
		t.Errorf("%+v", lines)
	}
	if !lines[1].Has("x", "nofail") || lines[0].Has("nofail") || lines[1].Device != "PARTLABEL=logs" || lines[1].Key != "-" {
		t.Errorf("%+v", lines[1])
	}
}

// systemdsOwn is the program whose units these stand in for.
const systemdsOwn = "/usr/lib/systemd/system-generators/systemd-cryptsetup-generator"

// Each unit has the name that systemd's generator gives to that of the line, whatever
// the name of the mapping is, and its order with regard to targets.
func TestUnitsStandInForThoseOfSystemd(t *testing.T) {
	if _, err := os.Stat(systemdsOwn); err != nil {
		t.Fatalf("%v (hint: it is in the Debian package systemd)", err)
	}
	text := ""
	for _, name := range []string{"data", "a-b", "a.b", ".hidden", "under_score", "colon:x", "per%cent", "dollar$", "at@", "ä", "back\\slash", `quo"te`, "a..b", "0"} {
		for suffix, options := range map[string]string{"": "keyagent,_netdev", "-nf": "keyagent,_netdev,nofail", "-na": "keyagent=x,_netdev,noauto", "-bad": "keyagent", "-root": "keyagent,_netdev,x-initrd.attach"} {
			text += name + suffix + " /dev/disk/by-id/x none " + options + "\n"
		}
	}
	dir := t.TempDir()
	tab, ours, theirs := filepath.Join(dir, "crypttab"), filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
	for _, d := range []string{ours, theirs} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(tab, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	g := &Generator{Crypttab: tab, Program: "/usr/bin/keyagent", Config: "/etc/keyagent/agent.yaml", Early: ours}
	if err := g.Run(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(systemdsOwn, theirs, filepath.Join(dir, "x"), filepath.Join(dir, "y"))
	cmd.Env = append(os.Environ(), "SYSTEMD_CRYPTTAB="+tab)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	mine, their := units(t, ours), units(t, theirs)
	if len(mine) != 14*5 {
		t.Errorf("%d units", len(mine))
	}
	for name, unit := range their {
		own, ok := mine[name]
		if !ok {
			t.Errorf("%s would be systemd's", name)
			continue
		}
		for _, line := range []string{"Before=remote-cryptsetup.target", "Before=cryptsetup.target", "After=remote-fs-pre.target", "Conflicts=umount.target", "Before=umount.target",
			"Wants=blockdev@dev-mapper-%i.target", "Before=blockdev@dev-mapper-%i.target"} {
			// A line without _netdev is wrong, and has no order with the network.
			if has := strings.Contains(unit, "\n"+line+"\n"); has != strings.Contains(own, "\n"+line+"\n") {
				t.Errorf("%s: %s: systemd %v", name, line, has)
			}
		}
		if strings.Contains(own, "keyagent-agent.service") != strings.Contains(unit, "remote-fs-pre") {
			t.Errorf("%s waits for the agent, or does not:\n%s", name, own)
		}
	}
	if len(their) != len(mine) {
		t.Errorf("%d units of systemd's, %d of ours", len(their), len(mine))
	}
}

func units(t *testing.T, dir string) map[string]string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, "systemd-cryptsetup@*.service"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, path := range all {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		out[filepath.Base(path)] = string(data)
	}
	return out
}

func TestNoCrypttabIsNoUnits(t *testing.T) {
	g := &Generator{Crypttab: filepath.Join(t.TempDir(), "none"), Early: t.TempDir()}
	if err := g.Run(); err != nil {
		t.Error(err)
	}
	g.Crypttab = t.TempDir()
	if err := g.Run(); err == nil {
		t.Error("a folder was read")
	}
}

// FuzzParse: whatever a line holds, its unit's name is a plain file name, and what it
// runs stays in its quotes.
func FuzzParse(f *testing.F) {
	f.Add([]byte("data /dev/vdb none keyagent=node-1,_netdev\n"))
	f.Add([]byte("a/../b /dev/vdb none keyagent=\"; x\n"))
	f.Add([]byte("%n\x00 $HOME none keyagent=$x,keyagent-format=%i"))
	f.Fuzz(func(t *testing.T, data []byte) {
		g := &Generator{Program: "/usr/bin/keyagent", Config: "/c"}
		for _, l := range Parse(data) {
			name := UnitName(l.Name)
			if strings.ContainsAny(name, "/\n\x00 ") || !strings.HasSuffix(name, ".service") {
				t.Fatalf("%q becomes %q", l.Name, name)
			}
			unit := g.unit(&l)
			for line := range strings.Lines(unit) {
				if v, ok := strings.CutPrefix(line, "ExecStart="); ok && strings.Count(v, `"`) != 4 {
					t.Fatalf("%q becomes %q", l.ID(), v)
				}
			}
			if strings.Count(unit, "\nExecStart=") != 1 || strings.Count(unit, "\n[") != 2 {
				t.Fatalf("%q becomes\n%s", l.Name, unit)
			}
		}
	})
}
