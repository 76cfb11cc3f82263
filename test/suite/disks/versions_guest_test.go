//go:build umlguest

package disks

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// oldPolicy is one that a key service of before knows all words of.
func oldPolicy(w *world) string {
	return strings.NewReplacer("[open, format, clone, rotate, retire]", "[open, format]").Replace(fmt.Sprintf(policy, w.maker.IssuerPath()))
}

// An upgrade, with nodes of both versions, and an upgrade that is taken back. The program of
// before knows no change of keys, no salts, no verdicts, no revocation and no checkpoints.
func TestVersionsMeetDuringAnUpgrade(t *testing.T) {
	old := os.Getenv("KEYAGENT_TEST_OLD_PROGRAM")
	w := newWorld(t)
	w.program = old
	w.write(t, "policy.yaml", oldPolicy(w))
	before, after := w.node(t, "old"), w.node(t, "new")
	before.program = old
	all := map[string][2]string{} // device and mount point
	var lines []string
	for _, id := range []string{"v-a", "v-b", "v-c"} {
		all[id] = [2]string{disk(t, diskSize), mountPoint(t, id)}
		removed(t, id)
		lines = append(lines, fmt.Sprintf("{id: %s, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", id, all[id][0], all[id][1]))
	}
	before.configure(t, lines...)
	// The configuration names operations that a program of before does not know.
	config := filepath.Join(before.dir, "agent.yaml")
	text := strings.Replace(string(must[[]byte](t)(os.ReadFile(config))), "rotate, retire, ", "", 1)
	check(t, os.WriteFile(config, []byte(text), 0o600))
	after.configure(t, lines...)
	makes := func(m *machine, id string) {
		t.Helper()
		m.must(t, "unlock", id)
		put(t, filepath.Join(all[id][1], "note"), id)
		m.must(t, "close", id)
	}
	opens := func(id string, nodes ...*machine) {
		t.Helper()
		for _, m := range nodes {
			m.must(t, "unlock", id)
			holds(t, filepath.Join(all[id][1], "note"), id)
			m.must(t, "close", id)
		}
	}
	replace := func(program, policy string) {
		t.Helper()
		w.stop()
		w.program = program
		w.write(t, "policy.yaml", policy)
		w.serve(t)
	}

	// Nodes are upgraded first, against all advice.
	makes(before, "v-a")
	makes(after, "v-b")
	opens("v-a", before, after)
	opens("v-b", after, before)
	a := after.start(t)
	a.waitFor(t, "msg=ready")
	if out, code := after.run(t, "rotate", "v-a"); code == 0 || !strings.Contains(out, "hint:") {
		t.Errorf("rotate with a key service of before: exit code %d\n%s", code, out)
	}
	after.must(t, "close", "v-a")
	if out, code := after.run(t, "retire", "v-a", "--destroy-the-key"); code == 0 || !strings.Contains(out, "hint:") {
		t.Errorf("retire with a key service of before: exit code %d\n%s", code, out)
	}
	a.kill()
	for _, id := range []string{"v-b", "v-c"} { // the agent opened all that it has
		after.must(t, "close", id)
	}
	opens("v-a", before, after)

	// The key service follows.
	replace("", fmt.Sprintf(policy, w.maker.IssuerPath()))
	opens("v-a", before, after)
	opens("v-b", before, after)
	makes(before, "v-c")
	opens("v-c", after, before)
	a = after.start(t)
	a.waitFor(t, "msg=ready")
	after.must(t, "rotate", "v-a")
	after.must(t, "rotate", "v-c")
	if v, state := w.keyVersion(t, "v-a"); v != 2 || state != "active" {
		t.Errorf("v-a is %s with key version %d", state, v)
	}
	for id := range all {
		after.must(t, "close", id)
	}
	a.kill()
	opens("v-a", before, after)
	opens("v-c", before, after)
	admin := func(args ...string) {
		t.Helper()
		tool(t, program(), append(args, "--admin", filepath.Join(w.dir, "admin.sock"))...)
	}
	admin("revoke", "--volume", "v-b")
	if out, code := before.run(t, "unlock", "v-b"); code == 0 || !strings.Contains(out, "revoked") {
		t.Errorf("a node of before and a volume that is revoked: exit code %d\n%s", code, out)
	}
	admin("revoke", "--volume", "v-b", "--lift")
	opens("v-b", before, after)
	after.must(t, "retire", "v-b", "--destroy-the-key", "--standalone")
	if out, code := before.run(t, "unlock", "v-b"); code == 0 {
		t.Errorf("a node of before and a retired volume: exit code %d\n%s", code, out)
	}

	// The upgrade is taken back: the key service of before does not start over what it does
	// not know, and spoils nothing.
	w.stop()
	w.write(t, "policy.yaml", oldPolicy(w))
	cmd := exec.Command(old, "serve", "--config", "serve.yaml")
	cmd.Dir = w.dir
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "audit log") {
		t.Errorf("a key service of before: %v\n%s", err, out)
	}
	replace("", fmt.Sprintf(policy, w.maker.IssuerPath()))
	opens("v-a", before, after)
	opens("v-c", before, after)
}
