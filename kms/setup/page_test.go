package setup

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/kms"
)

// page is docs/migration-constellation.md, which the tests below do as they read it.
func page(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/migration-constellation.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

const (
	pageMaster = "0123456789abcdef0123456789abcdef"
	pageSalt   = "some salt"
)

// masterFile is what a cluster leaves.
func masterFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "constellation-mastersecret.json")
	b64 := base64.StdEncoding.EncodeToString
	text := fmt.Sprintf(`{"key":"%s","salt":"%s"}`, b64([]byte(pageMaster)), b64([]byte(pageSalt)))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func keyUnder(t *testing.T, uri, name string) string {
	t.Helper()
	keys, err := DEKs(t.Context(), uri, "storage://no-store")
	if err != nil {
		t.Fatalf("%s: %v", Redact(uri), err)
	}
	defer keys.Close()
	dek, err := keys.GetOrCreate(t.Context(), name, SymmetricKeyLength)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	defer dek.Close()
	got := ""
	_ = dek.Use(func(b []byte) error { got = hex.EncodeToString(b); return nil })
	return got
}

// The page's table of keys, whose values another language's HKDF gave.
func TestKeysOfThePage(t *testing.T) {
	rows := regexp.MustCompile("(?m)^\\| `(constellation(?:-library)?)` \\| `([^`]+)` \\| `([0-9a-f]{64})` \\|$").FindAllStringSubmatch(page(t), -1)
	if len(rows) < 7 {
		t.Fatalf("the page has %d keys", len(rows))
	}
	master := masterFile(t)
	for _, r := range rows {
		if got := keyUnder(t, "kms://cluster-kms?constellationFile="+master+"&derivation="+r[1], r[2]); got != r[3] {
			t.Errorf("%s %s: %s, the page says %s", r[1], r[2], got, r[3])
		}
	}
}

// However the master secret and the salt are handed over, it is one secret; what would
// be another one is refused.
func TestOneSecretInAllItsForms(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	std, url64 := base64.StdEncoding.EncodeToString([]byte(pageMaster)), base64.URLEncoding.EncodeToString([]byte(pageMaster))
	salt, raw, text := write("salt", pageSalt), write("mastersecret", pageMaster), write("text", std+"\n")
	saltParam := "&salt=" + base64.URLEncoding.EncodeToString([]byte(pageSalt))
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	want := keyUnder(t, "kms://cluster-kms?constellationFile="+masterFile(t)+"&derivation=constellation", "s3proxy-kek")
	for _, source := range []string{"file=" + raw, "credential=mastersecret", "key=" + url64, "keyFile=" + text, "keyCredential=text"} {
		for _, s := range []string{saltParam, "&saltFile=" + salt} {
			if got := keyUnder(t, "kms://cluster-kms?derivation=constellation&"+source+s, "s3proxy-kek"); got != want {
				t.Errorf("%s%s: %s", strings.Split(source, "=")[0], strings.Split(s, "=")[0], got)
			}
		}
	}
	for _, source := range []string{"file=" + text, "credential=text"} {
		if _, err := KMS(t.Context(), "kms://cluster-kms?derivation=constellation&"+source+saltParam); !errors.Is(err, kms.ErrURI) || !strings.Contains(err.Error(), "keyFile") || strings.Contains(err.Error(), std) {
			t.Errorf("%s: %v", source, err)
		}
	}
	if _, err := KMS(t.Context(), "kms://cluster-kms?derivation=constellation&file="+raw); !errors.Is(err, kms.ErrURI) || !strings.Contains(err.Error(), "no salt") {
		t.Errorf("no salt: %v", err)
	}
	if got := keyUnder(t, "kms://cluster-kms?derivation=constellation&noSalt=true&file="+raw, "6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11"); got != "7028e6118b4b2749c36bc2fe4835416802aae4845d8b55c439fea5243134a771" {
		t.Errorf("by word without a salt: %s", got)
	}
	if name, instead := HoldsSecret("kms://cluster-kms?key=" + url64); name != "key" || instead != "keyFile" {
		t.Errorf("instead of %s: %s", name, instead)
	}
}

// URIs of 2024 are taken: no backend misses a parameter or has one too many.
func TestURIsOfThePageAreTaken(t *testing.T) {
	uris := regexp.MustCompile("(?m)^\\| `((?:kms|storage)://(?:aws|azure|gcp)\\?[^`]+)` \\| (?:the same(?:; `(&[^`]+)`)?)").FindAllStringSubmatch(page(t), -1)
	if len(uris) != 6 {
		t.Fatalf("the page has %d URIs: %q", len(uris), uris)
	}
	credentials := filepath.Join(t.TempDir(), "gcp.json")
	if err := os.WriteFile(credentials, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, u := range uris {
		uri := strings.Replace(u[1], "credentialsPath=F", "credentialsPath="+credentials, 1)
		for _, one := range []string{uri, uri + u[2]} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			var err error
			if strings.HasPrefix(one, "kms://") {
				_, err = KMS(ctx, one)
			} else {
				_, err = Storage(ctx, one)
			}
			cancel()
			if errors.Is(err, kms.ErrURI) && (strings.Contains(err.Error(), "parameter") || strings.Contains(err.Error(), "must be")) {
				t.Errorf("%s: %v", Redact(one), err)
			}
		}
	}
}

func TestAURIThatIsPutTogetherIsTheSameAgain(t *testing.T) {
	want := map[string]string{"accessKey": "a+b/c%2F&d=e f", "region": "eu-west-1", "profile": ""}
	uri, err := URI("kms", "aws", want)
	if err != nil {
		t.Fatal(err)
	}
	u, err := kms.ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range want {
		if got := u.Optional(name); got != value {
			t.Errorf("%s: %q", name, got)
		}
	}
	if err := u.Done(); err != nil {
		t.Error(err)
	}
	if uri, err := URI("storage", NoStore, nil); err != nil || uri != "storage://no-store" {
		t.Errorf("%s, %v", uri, err)
	}
	for _, bad := range []string{"", "a/b", "a?b", "a#b", "a@b", "a:1"} {
		if uri, err := URI("kms", bad, nil); !errors.Is(err, kms.ErrURI) {
			t.Errorf("%q gives %s, %v", bad, uri, err)
		}
	}
}

// The page's program opens a disk of Constellation's, as it stands there: only the
// names of the disk and of the file are the test's.
func TestTheProgramOfThePageOpensADisk(t *testing.T) {
	code := regexp.MustCompile("(?s)```go\n(.*?)```").FindStringSubmatch(page(t))
	if code == nil {
		t.Fatal("the page has no program")
	}
	const uuid = "6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11"
	key, err := hex.DecodeString("632939e484bd968ef833bb5391f7e1cf747409f0c3cc103eb48542c59fc9ab19")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, make([]byte, 20<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	format := exec.Command("cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--uuid", uuid, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-", disk)
	format.Stdin = bytes.NewReader(key)
	if out, err := format.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	body := code[1]
	for old, new := range map[string]string{
		`"--readonly"`:       `"--test-passphrase"`, // no device mapper is needed
		`"/dev/old", "old"`:  `os.Args[1]`,
		`constellationFile=`: `constellationFile=" + os.Args[2] + "`,
	} {
		if !strings.Contains(body, old) {
			t.Fatalf("the program has no %s:\n%s", old, body)
		}
		body = strings.Replace(body, old, new, 1)
	}
	body = strings.Replace(body, `" + os.Args[2] + "constellation-mastersecret.json`, `" + os.Args[2] + "`, 1)
	check := "if err != nil { fmt.Println(err); os.Exit(1) }\n"
	body = strings.Replace(body, "key, err := keys.GetOrCreate", check+"key, err := keys.GetOrCreate", 1)
	body = strings.Replace(body, "open := exec", check+"open := exec", 1)
	program := "package main\nimport (\n\"bytes\"\n\"context\"\n\"fmt\"\n\"os\"\n\"os/exec\"\n\"github.com/keyagent/keyagent/kms/setup\"\n)\nfunc main() {\nctx, uuid := context.Background(), \"" + uuid + "\"\n" + body + check + "}\n"
	source := filepath.Join(dir, "main.go")
	if err := os.WriteFile(source, []byte(program), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("go", "run", source, disk, masterFile(t)).CombinedOutput(); err != nil {
		t.Errorf("%v: %s\n%s", err, out, program)
	}
	if out, err := exec.Command("go", "run", source, disk, "/nonexistent").CombinedOutput(); err == nil {
		t.Errorf("it opens without the master secret: %s", out)
	}
}
