package policy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/config"
)

const (
	good4 = "4444444444444444444444444444444444444444444444444444444444444444"
	good7 = "7777777777777777777777777777777777777777777777777777777777777777"
	ek    = "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee"
	zeros = "0000000000000000000000000000000000000000000000000000000000000000"
	ones  = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
)

// whole is a policy that names everything. Tests change one line of it.
const whole = `version: 1
lifetime: 15m
trust:
  tpm:
    enrolled:
      - name: rack-7
        ek: ` + ek + `
profiles:
  - name: guest
    tpm:
      trust: ["enrolled:rack-7"]
      bank: sha256
      event_log: required
      pcrs:
        - pcr: 4
          accept: [` + good4 + `]
        - pcr: 7
          accept: [` + good7 + `]
grants:
  - name: data
    profiles: [guest]
    volumes: ["data-*"]
    operations: [open, format]
`

func parse(t testing.TB, text string) *Policy {
	t.Helper()
	p, err := Parse(Builtin(), "policy.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// lineOf finds where a text stands, so that no test counts lines.
func lineOf(t testing.TB, text, part string) int {
	t.Helper()
	before, _, ok := strings.Cut(text, part)
	if !ok {
		t.Fatalf("%q is not in the policy", part)
	}
	return 1 + strings.Count(before, "\n")
}

// Cases 20 and 46: whatever is unset, empty, doubled or unknown is an error that
// names its line.
func TestAPolicyIsReadStrictly(t *testing.T) {
	parse(t, whole)
	pcr7 := "        - pcr: 7\n          accept: [" + good7 + "]\n"
	for name, tt := range map[string]struct{ old, new, at, says string }{
		"no version":                 {"version: 1\n", "", "", "version"},
		"another version":            {"version: 1", "version: 3", "version: 3", "must be 1 or 2"},
		"an end that is missing":     {"version: 1", "version: 2", "version: 2", "cut off"},
		"an unknown field":           {"version: 1", "version: 1\nversions: 1", "versions: 1", `unknown field "versions"`},
		"an unknown field deep in":   {"      bank: sha256", "      bank: sha256\n      banks: all", "banks: all", `unknown field "banks"`},
		"a field twice":              {"lifetime: 15m", "lifetime: 15m\nlifetime: 16m", "lifetime: 16m", "already defined"},
		"a field twice, deep in":     {"      bank: sha256", "      bank: sha256\n      bank: sha256", "", "already defined"},
		"no lifetime":                {"lifetime: 15m\n", "", "", "lifetime"},
		"an empty lifetime":          {"15m", `""`, "lifetime:", "lifetime"},
		"a lifetime of nothing":      {"15m", "0s", "lifetime:", "1s to 24h"},
		"a lifetime below nothing":   {"15m", "-15m", "lifetime:", "1s to 24h"},
		"a lifetime of a year":       {"15m", "8760h", "lifetime:", "1s to 24h"},
		"no trust root":              {"    enrolled:\n      - name: rack-7\n        ek: " + ek, "    enrolled: []", "trust:", "nobody vouches"},
		"an EK that is none":         {ek, "eeee", "ek: eeee", "64 lower-case hex"},
		"an EK in capitals":          {ek, strings.ToUpper(ek), "ek: EEEE", "64 lower-case hex"},
		"an EK without a name":       {"name: rack-7", `name: ""`, `name: ""`, "1 to 64 letters"},
		"no profile":                 {whole[strings.Index(whole, "profiles:\n"):strings.Index(whole, "grants:")], "profiles: []\n", "profiles: []", "nothing could ever be accepted"},
		"no grant":                   {whole[strings.Index(whole, "grants:"):], "grants: []\n", "grants: []", "nothing could ever be allowed"},
		"a profile without evidence": {whole[strings.Index(whole, "    tpm:\n      trust"):strings.Index(whole, "grants:")], "", "- name: guest", "no evidence is demanded"},
		"a profile without a name":   {"name: guest", `name: ""`, `name: ""`, "1 to 64 letters"},
		"a trust that is unknown":    {"enrolled:rack-7", "enrolled:rack-8", "rack-8", "not in the trust section"},
		"a root that is an EK":       {"enrolled:rack-7", "root:rack-7", "root:rack-7", "not in the trust section"},
		"an empty trust":             {`trust: ["enrolled:rack-7"]`, "trust: []", "trust: []", "nobody vouches"},
		"no trust":                   {"      trust: [\"enrolled:rack-7\"]\n", "", "tpm:\n      bank", "nobody vouches"},
		"no bank":                    {"      bank: sha256\n", "", "", "sha256"},
		"another bank":               {"bank: sha256", "bank: sha1", "bank: sha1", "must be sha256"},
		"two banks":                  {"bank: sha256", "bank: [sha256, sha1]", "bank: [", "cannot unmarshal"},
		"no event_log":               {"      event_log: required\n", "", "", "required or optional"},
		"event_log: maybe":           {"event_log: required", "event_log: maybe", "event_log: maybe", "required or optional"},
		"no registers":               {whole[strings.Index(whole, "      pcrs:"):strings.Index(whole, "grants:")], "      pcrs: []\n", "pcrs: []", "no register would be compared"},
		"a register without number":  {"- pcr: 7\n          accept", "- accept", "- accept: [7777", "from 0 to 23"},
		"no replica":                 {"grants:", "replicas: {profiles: []}\ngrants:", "replicas:", "no machine could be a replica"},
		"replicas of nobody":         {"grants:", "replicas: {}\ngrants:", "replicas:", "no machine could be a replica"},
		"a replica without profile":  {"grants:", "replicas: {profiles: [guest, other]}\ngrants:", "replicas:", `"other" is not a profile`},
		"replicas by another name":   {"grants:", "replicas: {profiles: [guest], machines: [x]}\ngrants:", "replicas:", `unknown field "machines"`},
		"register 24":                {"pcr: 7", "pcr: 24", "pcr: 24", "from 0 to 23"},
		"register -1":                {"pcr: 7", "pcr: -1", "pcr: -1", "cannot unmarshal"},
		"a register twice":           {"pcr: 7", "pcr: 4", "pcr: 4\n          accept: [7777", "is named twice"},
		"an empty allow-list":        {"[" + good7 + "]", "[]", "accept: []", "no value would be accepted"},
		"no allow-list":              {pcr7, "        - pcr: 7\n", "- pcr: 7", "no value would be accepted"},
		"an empty value":             {"[" + good7 + "]", `[""]`, `[""]`, "64 lower-case hex"},
		"a value in capitals":        {good7, strings.Repeat("AB", 32), "ABAB", "64 lower-case hex"},
		"a value of another bank":    {good7, strings.Repeat("ab", 20), "abab", "64 lower-case hex"},
		"all zeros (case 26)":        {good7, `"` + zeros + `"`, zeros, "allow_unextended"},
		"all ones (case 26)":         {good7, ones, ones, "allow_unextended"},
		"warn_only everywhere":       {good4 + "]", good4 + "]\n          warn_only: true", "", "enforced"},
		"a grant without a name":     {"name: data", `name: ""`, `name: ""`, "1 to 64 letters"},
		"a grant for nobody":         {"profiles: [guest]", "profiles: []", "profiles: []", "for nobody"},
		"a grant for a stranger":     {"profiles: [guest]", "profiles: [guests]", "profiles: [guests]", "not a profile"},
		"a grant for no volume":      {`volumes: ["data-*"]`, "volumes: []", "volumes: []", "no volume"},
		"a volume with a path":       {"data-*", "../data", "../data", "volume name"},
		"a volume without a name":    {"data-*", "", `volumes: [""]`, "volume name"},
		"two stars":                  {"data-*", "data-**", "data-**", "volume name"},
		"a grant that allows none":   {"operations: [open, format]", "operations: []", "operations: []", "allows nothing"},
		"an unknown operation":       {"operations: [open, format]", "operations: [open, erase]", "erase", "not an operation"},
		"it adopts from nobody":      {"operations: [open, format]", "operations: [open]\n    adopts: [\"\"]", "adopts:", "name of a grant"},
		"an expression that is none": {"operations: [open, format]", "operations: [open]\n    when: volume ==", "when:", "expression"},
		"an expression of a number":  {"operations: [open, format]", "operations: [open]\n    when: 1 + 1", "when:", "must give bool"},
		"an expression of a secret":  {"operations: [open, format]", "operations: [open]\n    when: password == ''", "when:", "undeclared"},
		"a second document":          {"    operations: [open, format]\n", "    operations: [open]\n---\nversion: 1\n", "", "more than one document"},
		"no YAML":                    {"version: 1", "version: [1", "", "line"},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.Replace(whole, tt.old, tt.new, 1)
			if name == "warn_only everywhere" {
				text = strings.Replace(text, good7+"]", good7+"]\n          warn_only: true", 1)
			}
			_, err := Parse(Builtin(), "policy.yaml", []byte(text))
			if !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("got %v, want one that says %q", err, tt.says)
			}
			if tt.at == "" {
				return
			}
			if want := "line " + strconv.Itoa(lineOf(t, text, tt.at)); !strings.Contains(err.Error(), want+":") {
				t.Errorf("%v does not say %s", err, want)
			}
		})
	}
	for name, text := range map[string]string{"nothing": "", "a comment": "# nothing\n", "null": "null\n", "a list": "- 1\n", "a number": "1\n"} {
		if _, err := Parse(Builtin(), "policy.yaml", []byte(text)); !errors.Is(err, config.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNamesAreUnique(t *testing.T) {
	profile := whole[strings.Index(whole, "  - name: guest"):strings.Index(whole, "grants:")]
	grant := whole[strings.Index(whole, "  - name: data"):]
	enrolled := "      - name: rack-7\n        ek: " + ek + "\n"
	for name, block := range map[string]string{"profile": profile, "grant": grant, "enrolled": enrolled} {
		_, err := Parse(Builtin(), "policy.yaml", []byte(strings.Replace(whole, block, block+block, 1)))
		if !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), "used twice") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A section of a kind that is not known here is an error, of profiles and of trust.
func TestAnUnknownKindIsNamed(t *testing.T) {
	for from, want := range map[string]string{"    tpm:\n      trust": `unknown field "sgx"`, "  tpm:\n    ": `"sgx" is not a kind of evidence`} {
		at := strings.Index(whole, from)
		if at < 0 {
			t.Fatalf("%q is not in the test's policy", from)
		}
		indent := from[:len(from)-len(strings.TrimLeft(from, " "))]
		text := whole[:at] + indent + "sgx: {}\n" + whole[at:]
		if _, err := Parse(Builtin(), "policy.yaml", []byte(text)); !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), fmt.Sprintf("line %d", strings.Count(whole[:at], "\n")+1)) {
			t.Errorf("%q: %v", from, err)
		}
	}
}

func certificateIn(t testing.TB) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// Case 20: a trust root that is named and holds nothing.
func TestATrustRootHoldsExactlyOneCertificate(t *testing.T) {
	dir := t.TempDir()
	one := certificateIn(t)
	rooted := strings.Replace(whole, "    enrolled:\n", "    roots: [{name: lab, file: root.pem}]\n    enrolled:\n", 1)
	load := func(pemText string) (*Policy, error) {
		if err := os.WriteFile(filepath.Join(dir, "root.pem"), []byte(pemText), 0o600); err != nil {
			t.Fatal(err)
		}
		return Parse(Builtin(), filepath.Join(dir, "policy.yaml"), []byte(rooted))
	}
	first, err := load(one)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"empty": "", "text": "certificate", "two": one + one, "a key": strings.ReplaceAll(one, "CERTIFICATE", "PRIVATE KEY"),
		"broken": strings.Replace(one, "MII", "MIA", 1),
	} {
		if _, err := load(text); !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), "line 5") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The certificate is part of what the policy says, and of its hash.
	second, err := load(certificateIn(t))
	if err != nil || second.Hash() == first.Hash() {
		t.Errorf("another root, the same hash %s, %v", first.Hash(), err)
	}
	os.Remove(filepath.Join(dir, "root.pem"))
	if _, err := Parse(Builtin(), filepath.Join(dir, "policy.yaml"), []byte(rooted)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	for name, root := range map[string]string{"both": "{name: lab, file: root.pem, pem: x}", "neither": "{name: lab}"} {
		_, err := Parse(Builtin(), "policy.yaml", []byte(strings.Replace(rooted, "{name: lab, file: root.pem}", root, 1)))
		if !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), "either file or pem") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
