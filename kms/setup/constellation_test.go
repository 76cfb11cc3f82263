package setup

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// A disk that Constellation made opens with the key that is derived from its file.
// The header is cryptsetup's, with a key that another language's HKDF gave.
func TestADiskFromConstellationOpens(t *testing.T) {
	const uuid = "6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11"
	key, err := hex.DecodeString("632939e484bd968ef833bb5391f7e1cf747409f0c3cc103eb48542c59fc9ab19")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	disk, master := filepath.Join(dir, "disk"), filepath.Join(dir, "constellation-mastersecret.json")
	cryptsetup := func(key []byte, args ...string) error {
		cmd := exec.Command("cryptsetup", args...)
		cmd.Stdin = bytes.NewReader(key)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("cryptsetup %s: %w: %s", args[0], err, out)
		}
		return nil
	}
	if err := os.WriteFile(disk, make([]byte, 20<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := cryptsetup(key, "luksFormat", "--batch-mode", "--type", "luks2", "--uuid", uuid, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-", disk); err != nil {
		t.Fatal(err)
	}
	b64 := base64.StdEncoding.EncodeToString
	text := fmt.Sprintf(`{"key":"%s","salt":"%s"}`, b64([]byte("0123456789abcdef0123456789abcdef")), b64([]byte("some salt")))
	if err := os.WriteFile(master, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	url64 := base64.URLEncoding.EncodeToString
	for _, uri := range []string{
		"kms://cluster-kms?derivation=constellation&constellationFile=" + master,
		"kms://cluster-kms?derivation=constellation&key=" + url64([]byte("0123456789abcdef0123456789abcdef")) + "&salt=" + url64([]byte("some salt")),
	} {
		keys, err := DEKs(t.Context(), uri, "storage://no-store")
		if err != nil {
			t.Fatal(err)
		}
		defer keys.Close()
		dek, err := keys.GetOrCreate(t.Context(), uuid, 32)
		if err != nil {
			t.Fatal(err)
		}
		defer dek.Close()
		if err := dek.Use(func(b []byte) error { return cryptsetup(b, "open", "--test-passphrase", "--key-file", "-", disk) }); err != nil {
			t.Errorf("%s: %v", Redact(uri), err)
		}
	}
	wrong := bytes.Repeat([]byte{1}, 32)
	if err := cryptsetup(wrong, "open", "--test-passphrase", "--key-file", "-", disk); err == nil {
		t.Error("any key opens it")
	}
}
