package rules

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/storage/framed"
)

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("../../..", path))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// rows are the cells of each table row of a Markdown file.
func rows(text string) [][]string {
	var out [][]string
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|---") {
			continue
		}
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		out = append(out, cells)
	}
	return out
}

// TestTheVectorsOfTheKeysSpecificationHold derives what docs/spec/keys.md says.
func TestTheVectorsOfTheKeysSpecificationHold(t *testing.T) {
	n := 0
	for _, r := range rows(read(t, "docs/spec/keys.md")) {
		if len(r) != 6 || r[0] == "salt" {
			continue
		}
		version, _ := strconv.Atoi(r[3])
		length, _ := strconv.Atoi(r[4])
		master, err := secret.From([]byte("0123456789abcdef0123456789abcdef"))
		if err != nil {
			t.Fatal(err)
		}
		k, err := cluster.New(cluster.Options{MasterSecret: master, Salt: []byte(r[0])})
		if err != nil {
			t.Fatal(err)
		}
		key, _, err := k.Generate(t.Context(), kms.Binding{VolumeID: r[1], Purpose: kms.Purpose(r[2]), Version: uint32(version), Length: length})
		if err != nil {
			t.Fatal(err)
		}
		_ = key.Use(func(b []byte) error {
			if got := hex.EncodeToString(b); got != r[5] {
				t.Errorf("%v: got %s", r, got)
			}
			return nil
		})
		if r[0] == "" && !strings.Contains(read(t, "docs/spec/keys.md"), "`"+k.KEK()+"`") {
			t.Errorf("the KEK's name is %s", k.KEK())
		}
		n++
	}
	if n != 5 {
		t.Fatalf("%d vectors were found", n)
	}
}

// TestTheVectorOfTheEnvelopeHolds opens what another language's AES-GCM made.
func TestTheVectorOfTheEnvelopeHolds(t *testing.T) {
	m := regexp.MustCompile("the envelope is\n`([0-9a-f]{120})`").FindStringSubmatch(read(t, "docs/spec/keys.md"))
	if m == nil {
		t.Fatal("the vector was not found")
	}
	blob, err := hex.DecodeString(m[1])
	if err != nil {
		t.Fatal(err)
	}
	kek := make([]byte, 32)
	for i := range kek {
		kek[i] = byte(i)
	}
	k, err := secret.From(kek)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	key, err := backend.Open(k, kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 1, Length: 32}, blob)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Close()
	_ = key.Use(func(b []byte) error {
		if hex.EncodeToString(b) != strings.Repeat("ff", 32) {
			t.Errorf("the key is %x", b)
		}
		return nil
	})
}

func TestTheVectorOfTheObjectSpecificationHolds(t *testing.T) {
	line := regexp.MustCompile(`(?m)^keyagent object 1 .*\n`).FindString(read(t, "docs/spec/storage-object.md"))
	data, token, err := framed.Unframe([]byte(line + "data"))
	if err != nil || string(data) != "data" || token != "ABCDEFGHIJKLMNOPQRSTUVWXYZ" {
		t.Errorf("%q, %q, %v", data, token, err)
	}
}

// TestTheVectorOfTheRecordSpecificationHolds computes the MAC as the text says.
func TestTheVectorOfTheRecordSpecificationHolds(t *testing.T) {
	text := read(t, "docs/spec/volume-record.md")
	body := regexp.MustCompile(`(?m)^\{"volume_id".*\}$`).FindString(text)
	want := regexp.MustCompile("is `([0-9a-f]{64})`").FindStringSubmatch(text)
	if body == "" || want == nil {
		t.Fatal("the vector was not found")
	}
	key := make([]byte, 32)
	for i := range key {
		key[i] = byte(i)
	}
	h := hmac.New(sha256.New, key)
	for _, part := range []string{"keyagent volume record mac v1", "volumes/data-1", body} {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(part))))
		h.Write([]byte(part))
	}
	if got := fmt.Sprintf("%x", h.Sum(nil)); got != want[1] {
		t.Errorf("the MAC is %s", got)
	}
}

// TestTheExitCodesAreThoseOfTheDocument compares both ways.
func TestTheExitCodesAreThoseOfTheDocument(t *testing.T) {
	n := 0
	for _, r := range rows(read(t, "docs/exit-codes.md")) {
		if len(r) != 3 || r[1] == "class" || r[1] == "" {
			continue
		}
		if got := strconv.Itoa(failure.ExitCode(failure.Class(r[1]))); got != r[0] {
			t.Errorf("%s has exit code %s, the document says %s", r[1], got, r[0])
		}
		n++
	}
	if n != failure.Classes() {
		t.Errorf("the document has %d classes, there are %d", n, failure.Classes())
	}
}

var link = regexp.MustCompile(`\]\(([^)#:]+)\)`)

func TestLinksBetweenDocumentsLeadSomewhere(t *testing.T) {
	pages, err := filepath.Glob("../../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	specs, _ := filepath.Glob("../../../docs/spec/*.md")
	for _, page := range append(append(pages, specs...), "../../../README.md") {
		data, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(data), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(page), m[1])); err != nil {
				t.Errorf("%s: %v", page, err)
			}
		}
	}
}

var testName = regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9]+|[a-z-]+\\.txtar)`")

// TestTheTestsOfTheAttackTableExist: a test that is renamed or deleted is
// missed there.
func TestTheTestsOfTheAttackTableExist(t *testing.T) {
	have := map[string]bool{}
	err := filepath.WalkDir("../../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if strings.HasSuffix(path, ".txtar") {
			have[d.Name()] = true
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`).FindAllSubmatch(data, -1) {
			have[string(m[1])] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	named := testName.FindAllStringSubmatch(read(t, "docs/ATTACKS.md"), -1)
	if len(named) < 40 {
		t.Fatalf("only %d tests are named", len(named))
	}
	for _, m := range named {
		if !have[m[1]] {
			t.Errorf("%s does not exist", m[1])
		}
	}
}

// TestEachDependencyHasItsReason: what go.mod requires directly stands in
// docs/DEPENDENCIES.md.
func TestEachDependencyHasItsReason(t *testing.T) {
	text, n := read(t, "docs/DEPENDENCIES.md"), 0
	for line := range strings.Lines(read(t, "go.mod")) {
		fields := strings.Fields(line)
		if len(fields) != 2 || !strings.Contains(fields[0], "/") || !strings.HasPrefix(fields[1], "v") {
			continue
		}
		n++
		parts := strings.Split(regexp.MustCompile(`/v\d+$`).ReplaceAllString(fields[0], ""), "/")
		if last := parts[len(parts)-1]; !strings.Contains(text, last) {
			t.Errorf("%s is not in it", fields[0])
		}
	}
	if n < 25 {
		t.Fatalf("only %d dependencies were found", n)
	}
}
