//go:build linux && amd64

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// deb builds the Debian package of the program under test.
func deb(t testing.TB, version string) string {
	t.Helper()
	return packageOf(t, program, version)
}

func packageOf(t testing.TB, program, version string) string {
	t.Helper()
	out := t.TempDir()
	cmd := exec.Command("../../../deploy/debian/build", program, version, out)
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1780000000")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	all, err := filepath.Glob(filepath.Join(out, "*.deb"))
	if err != nil || len(all) != 1 {
		t.Fatalf("%v, %v", all, err)
	}
	return all[0]
}

// A package is installed, upgraded and purged in a Debian of its own. It enables nothing,
// and what an administrator or a key service wrote is there afterwards.
func TestThePackageIsInstalledUpgradedAndPurged(t *testing.T) {
	first, second := deb(t, "v0.1.0"), deb(t, "v0.2.0")
	if digest(t, first) != digest(t, deb(t, "v0.1.0")) {
		t.Error("the same program makes two packages")
	}
	for _, tool := range []string{"lintian", "man"} {
		_, err := exec.LookPath(tool)
		if err != nil {
			t.Fatalf("%v (hint: make deps)", err)
		}
	}
	if out, err := exec.Command("lintian", "--allow-root", "--fail-on", "error", first).CombinedOutput(); err != nil {
		t.Errorf("lintian: %v: %s", err, out)
	}
	// Debian's images leave manuals out when they install a package.
	whole := t.TempDir()
	if out, err := exec.Command("dpkg", "-x", first, whole).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	page := exec.Command("man", "-l", "-Tutf8", "-P", "cat", filepath.Join(whole, "usr/share/man/man1/keyagent.1.gz"))
	if text, err := page.CombinedOutput(); err != nil || !strings.Contains(string(text), "confidential VMs") {
		t.Errorf("man keyagent: %v: %s", err, text)
	}
	cache, _ := debian(t)
	tar, err := cache.Debian(t.Context(), "bookworm")
	must(t, err)
	root := t.TempDir()
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %q: %v: %s", name, args, err, out)
		}
		return string(out)
	}
	inside := func(args ...string) string { t.Helper(); return run("chroot", append([]string{root}, args...)...) }
	there := func(path string) bool { _, err := os.Lstat(filepath.Join(root, path)); return err == nil }
	write := func(path, text string) {
		t.Helper()
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755))
		must(t, os.WriteFile(filepath.Join(root, path), []byte(text), 0o600))
	}
	const wanted = "etc/systemd/system/multi-user.target.wants/keyagent-agent.service"
	kept := map[string]string{"etc/keyagent/agent.yaml": "servers: []\n", "etc/keyagent/master.secret": "a secret", "var/lib/keyagent/records/data": "a record"}

	run("tar", "-C", root, "-xf", tar)
	for _, version := range []string{first, second} {
		must(t, os.Link(version, filepath.Join(root, "keyagent.deb")))
		inside("dpkg", "-i", "/keyagent.deb")
		must(t, os.Remove(filepath.Join(root, "keyagent.deb")))
		if version == first {
			if !there(wanted) || !strings.Contains(inside("cat", "/usr/lib/systemd/system/keyagent-agent.service"), "ConditionPathExists=/etc/keyagent/agent.yaml") {
				t.Error("the agent is not enabled, or runs before it is configured")
			}
			if there("etc/systemd/system/sockets.target.wants/keyagent-keys.socket") || there("etc/systemd/system/multi-user.target.wants/keyagent-serve.service") {
				t.Error("what is for other machines is enabled")
			}
			for path, text := range kept {
				write(path, text)
			}
			inside("systemctl", "disable", "keyagent-agent.service")
		} else if there(wanted) {
			t.Error("what the administrator disabled is enabled again")
		}
		inside("keyagent", "version")
		inside("systemd-analyze", "verify", "--man=no", "keyagent-agent.service", "keyagent-serve.service")
		write("etc/crypttab", "data /dev/vdb none keyagent,_netdev\n")
		inside("/usr/lib/systemd/system-generators/keyagent-generator", "/tmp")
		if !strings.Contains(inside("cat", "/tmp/systemd-cryptsetup@data.service"), "ExecStart=/usr/bin/keyagent unlock") {
			t.Error("the generator's unit runs something else")
		}
	}
	if got := inside("dpkg-query", "-W", "-f", "${Version}", "keyagent"); got != "0.2.0" {
		t.Errorf("after the upgrade it is version %s", got)
	}
	// As a builder of images does. Debian's own preset enables what no other one names.
	inside("systemctl", "preset-all")
	enabled := inside("sh", "-c", "find /etc/systemd/system -name 'keyagent-*' -path '*.wants/*'")
	if strings.TrimSpace(enabled) != "/"+wanted {
		t.Errorf("systemctl preset-all enables %q", enabled)
	}
	inside("dpkg", "--purge", "keyagent")
	for _, path := range []string{wanted, "usr/bin/keyagent", "usr/lib/systemd/system/keyagent-agent.service", "usr/lib/systemd/system-generators/keyagent-generator"} {
		if there(path) {
			t.Errorf("a purge leaves %s", path)
		}
	}
	for path, text := range kept {
		if got, err := os.ReadFile(filepath.Join(root, path)); err != nil || string(got) != text {
			t.Errorf("a purge does not leave %s: %v", path, err)
		}
	}
}
