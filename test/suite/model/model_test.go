package model

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// full makes the run exhaustive: make test-full sets it.
const full = "KEYAGENT_MODEL_FULL"

// megabytes that a run may use.
const megabytes = 4000

// check searches all states of a variant of the model, and returns the first assertion
// that does not hold, or nothing.
func check(t *testing.T, defines ...string) string {
	t.Helper()
	source, err := filepath.Abs("../../../docs/spec/volume-life.pml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	run := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s (hint: make deps)", name, err, out)
		}
		return string(out)
	}
	run("spin", append(append([]string{"-a"}, defines...), source)...)
	// The processes have provided clauses, which partial-order reduction does not know.
	run("gcc", "-O2", "-DSAFETY", "-DNOREDUCE", "-DCOLLAPSE", fmt.Sprintf("-DMEMLIM=%d", megabytes), "-o", "pan", "pan.c")
	out := run("./pan", "-E", "-m500000")
	if strings.Contains(out, "max search depth too small") || strings.Contains(out, "memory limit") || strings.Contains(out, "reached -DMEMLIM") {
		t.Fatalf("%v: not all states were looked at: %s", defines, out)
	}
	if m := regexp.MustCompile(`(\d+) states, stored`).FindStringSubmatch(out); m != nil {
		t.Logf("%v: %s states", defines, m[1])
	}
	if m := regexp.MustCompile(`assertion violated (.*)`).FindStringSubmatch(out); m != nil {
		return m[1]
	}
	if !strings.Contains(out, "errors: 0") {
		t.Fatalf("%v: %s", defines, out)
	}
	return ""
}

// Cases 47 and 64: in no reachable state does a node write data that the record does
// not name, do two nodes write, or does an active volume lack its header or its file
// system; and each rule that is left out is missed.
func TestTheModelOfAVolumesLifeHolds(t *testing.T) {
	sizes := [][]string{{"-DSMALL"}}
	if os.Getenv(full) != "" {
		sizes = [][]string{nil, {"-DIDS=5", "-DFAULTS=2", "-DFREEZES=1"}}
	}
	for _, size := range sizes {
		for _, variant := range [][]string{nil, {"-DMACHINE"}} {
			defines := slices.Concat(variant, size)
			if broken := check(t, defines...); broken != "" {
				t.Errorf("%v: it does not hold that %s", defines, broken)
			}
		}
	}
	for _, variant := range []string{"-DBROKEN_STANDS", "-DBROKEN_AGAIN", "-DBROKEN_CONFIRM", "-DBROKEN_EXPIRY", "-DBROKEN_WATCH", "-DLATE_WRITES"} {
		broken := check(t, variant, "-DSMALL")
		if broken == "" {
			t.Errorf("%s: nobody noticed", variant)
		}
		t.Logf("%s: it does not hold that %s", variant, broken)
	}
}
