package policy

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/attestation/facts"
)

// Projects of a cloud are compared whatever vouches for the TPM, and its root is the same
// one however the policy names it.
func TestProjectsCountWhateverVouches(t *testing.T) {
	google := "-----BEGIN CERTIFICATE-----"
	if text, err := os.ReadFile("../tpm/google/ek-ak-ca-root.pem"); err != nil {
		t.Fatal(err)
	} else {
		google = strings.ReplaceAll(strings.TrimSpace(string(text)), "\n", "\\n")
	}
	for section, prefix := range map[string]string{"ak_roots": "ak-root:", "roots": "root:"} {
		text := strings.Replace(plain(hardware), "{name: google, builtin: google}", `{name: google, pem: "`+google+`\n"}`, 1)
		text = strings.Replace(strings.Replace(text, "ak_roots:", section+":", 1), "ak-root:google", prefix+"google", 1)
		without := strings.Replace(text, "      gce: {projects: [lab], zones: [z1], instances: [node]}\n", "", 1)
		if _, err := Parse(Builtin(), "policy.yaml", []byte(without)); err == nil || !strings.Contains(err.Error(), "must name its projects") {
			t.Errorf("%s, without projects: %v", section, err)
		}
		p := parse(t, text)
		c := googleClaims()
		c[0].Trust = prefix + "google"
		n := slices.IndexFunc(p.profiles, func(pr Profile) bool { return pr.Name == "google" })
		differs := func() int {
			hard, _ := p.profiles[n].compare(verified(t, c...))
			return len(hard)
		}
		if d := differs(); d != 0 {
			t.Errorf("%s: %d differences", section, d)
		}
		facts.GCEProjectID.Put(c[0].Facts, "other")
		if d := differs(); d != 1 {
			t.Errorf("%s, of another project: %d differences", section, d)
		}
		delete(c[0].Facts, string(facts.GCEProjectID))
		if d := differs(); d == 0 {
			t.Errorf("%s, of no project: no difference", section)
		}
	}
}
