package policy

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A registry of platforms is a file beside the policy, and part of what it says.
func TestPlatformsStandInARegistry(t *testing.T) {
	dir := t.TempDir()
	ppid := hexOf("bb", 16)
	write := func(text string) (*Policy, error) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "hosts.txt"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		text = plain(hardware)
		start := strings.Index(text, "  - name: tdx")
		at := start + strings.Index(text[start:], "      platforms:")
		end := at + strings.Index(text[at:], "\n")
		return Parse(Builtin(), filepath.Join(dir, "policy.yaml"), []byte(text[:at]+"      platforms_file: hosts.txt"+text[end:]))
	}
	good, err := write("# of the cloud\n" + strings.ToUpper(ppid) + " # host 7\n\n" + hexOf("01", 16) + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if a, err := good.Appraise(verified(t, tdxClaims())); err != nil || a.Profile != "tdx" {
		t.Errorf("%+v, %v", a, err)
	}
	other, err := write(hexOf("02", 16))
	if err != nil {
		t.Fatal(err)
	}
	n := slices.IndexFunc(other.profiles, func(pr Profile) bool { return pr.Name == "tdx" })
	if hard, _ := other.profiles[n].compare(verified(t, tdxClaims())); len(hard) != 1 || hard[0].Field != "tdx.platform" || !strings.Contains(hard[0].String(), "hosts.txt") {
		t.Errorf("%v", hard)
	}
	if good.Hash() == other.Hash() {
		t.Error("two registries, and one hash")
	}
	for _, text := range []string{"", "# nothing\n", "zz\n", hexOf("01", 15)} {
		if _, err := write(text); err == nil {
			t.Errorf("%q is a registry", text)
		}
	}
}
