//go:build amd64 || arm64

package confine

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/systemd"
)

// names are those of calls, by number, as C's headers have them.
func names(t *testing.T) map[uint32]string {
	t.Helper()
	out := map[uint32]string{}
	for _, path := range []string{"/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h"} {
		text, err := os.ReadFile(path)
		if err != nil || len(out) > 0 {
			continue
		}
		for _, m := range regexp.MustCompile(`(?m)^#define __NR(?:3264)?_(\w+) (\d+)`).FindAllStringSubmatch(string(text), -1) {
			n, err := strconv.ParseUint(m[2], 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			out[uint32(n)] = m[1]
		}
	}
	if out[unix.SYS_PTRACE] != "ptrace" {
		t.Fatal("no headers of the kernel's (hint: make deps)")
	}
	return out
}

// allowed are the calls that a unit's lines SystemCallFilter= leave.
func allowed(t *testing.T, unit string) map[string]bool {
	t.Helper()
	text, err := systemd.Units.ReadFile("units/" + unit)
	if err != nil {
		t.Fatal(err)
	}
	sets := map[string][]string{}
	var members func(name string) []string
	members = func(name string) (out []string) {
		if !strings.HasPrefix(name, "@") {
			return []string{name}
		}
		if have, ok := sets[name]; ok {
			return have
		}
		listed, err := exec.Command("systemd-analyze", "syscall-filter", "--no-pager", name).Output()
		if err != nil {
			t.Fatalf("systemd-analyze: %v (hint: make deps)", err)
		}
		for line := range strings.Lines(string(listed)) {
			if word := strings.TrimSpace(line); strings.HasPrefix(line, " ") && !strings.HasPrefix(word, "#") {
				out = append(out, members(word)...)
			}
		}
		sets[name] = out
		return out
	}
	left := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		list, ok := strings.CutPrefix(strings.TrimSpace(line), "SystemCallFilter=")
		if !ok {
			continue
		}
		list, without := strings.CutPrefix(list, "~")
		for _, name := range strings.Fields(list) {
			for _, call := range members(name) {
				left[call] = !without
			}
		}
	}
	if !left["read"] || !left["openat"] || left["ptrace"] {
		t.Fatalf("%s: the filter was not understood", unit)
	}
	// What RestrictNamespaces= looks at is not in the filter.
	if !strings.Contains(string(text), "\nRestrictNamespaces=yes\n") {
		t.Fatalf("%s allows namespaces", unit)
	}
	for _, call := range []string{"unshare", "setns"} {
		delete(left, call)
	}
	return left
}

// Nothing that runs below a shipped unit is stopped by what the process does itself.
func TestTheUnitsRefuseAllThatIsRefusedHere(t *testing.T) {
	name := names(t)
	for unit, works := range map[string][]Work{
		"keyagent-serve.service": {Keys, Commands}, "keyagent-kubekms.service": {Keys, Commands}, "keyagent-agent.service": {Volumes}, "keyagent-csi-proxy.service": {Volumes},
	} {
		left := allowed(t, unit)
		needed := []string{"seccomp"}
		if !slices.Contains(works, Volumes) {
			needed = append(needed, "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")
		}
		for _, call := range needed {
			if !left[call] {
				t.Errorf("%s refuses %s, and the process could not confine itself", unit, call)
			}
		}
		check := func(calls []uint32) {
			for _, n := range calls {
				if name[n] == "" || left[name[n]] {
					t.Errorf("%s allows call %d, %q", unit, n, name[n])
				}
			}
		}
		for _, w := range works {
			for _, g := range refused {
				if !slices.Contains(g.allowed, w) {
					check(g.calls)
				}
			}
		}
		check(own)
		check(absent)
	}
}
