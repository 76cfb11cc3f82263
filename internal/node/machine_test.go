package node

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

func loadText(t *testing.T, more string) (*Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.yaml")
	text := "servers: [{address: \"a:1\", pins: [sha256:" + strings.Repeat("ab", 32) + "]}]\n" + more
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(path)
}

// A volume that is the machine's own is asked for by the name of the TPM in it.
func TestAVolumeIsNamedByItsMachine(t *testing.T) {
	p := swtpm.New(t, nil)
	c, err := loadText(t, "tpm: {device: \""+p.Device+"\"}\nvolumes:\n"+
		"  - {id: \"root-{tpm.ek}\", name: root, device: /dev/vda}\n"+
		"  - {id: \"data-{tpm.ek}\", name: data, device: /dev/vdb, after: [\"root-{tpm.ek}\"]}\n"+
		"key_socket: {path: /run/keyagent/keys.sock, consumers: [{volume: \"data-{tpm.ek}\", unit: systemd-cryptsetup@data.service}]}\n")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
	ek, found := strings.CutPrefix(c.Volumes[0].ID, "root-")
	if !found || len(ek) != 64 || strings.Trim(ek, "0123456789abcdef") != "" {
		t.Errorf("%q", c.Volumes[0].ID)
	}
	if c.Volumes[1].ID != "data-"+ek || c.Volumes[1].After[0] != c.Volumes[0].ID || c.Volumes[0].Name != "root" || c.KeySocket.Consumers[0].Volume != c.Volumes[1].ID {
		t.Errorf("%+v", c.Volumes)
	}
	if err := c.Resolve(t.Context()); err != nil || c.Volumes[1].ID != "data-"+ek {
		t.Errorf("a second time: %v, %q", err, c.Volumes[1].ID)
	}
}

func TestWordsThatAreNoneAreRefused(t *testing.T) {
	for id, want := range map[string]string{
		"root-{tpm.ak}":    "{tpm.ak} is not one of",
		"root-{tpm.ek":     "not closed",
		"root-}":           "must be 1 to 128",
		"{cmdline.}":       "is not one of",
		"{cmdline.../..}":  "is not one of",
		"{{smbios.uuid}}":  "is not one of",
		"a b{smbios.uuid}": "must be 1 to 128",
	} {
		_, err := loadText(t, "volumes:\n  - {id: \""+id+"\", name: root, device: /dev/vda}\n")
		if failure.Of(err).Class != failure.Configuration || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "volumes[0]") {
			t.Errorf("%s: %v", id, err)
		}
	}
	if _, err := loadText(t, "volumes:\n  - {id: \"root-{smbios.uuid}\", device: /dev/vda}\n"); err == nil || !strings.Contains(err.Error(), "name") {
		t.Errorf("without a name: %v", err)
	}
}

func TestAWordOfTheKernelsCommandLine(t *testing.T) {
	const line = "root=/dev/mapper/root keyagent.volume=node-7 keyagent.volumes=x\n"
	if v, err := inCommandLine(line, "volume"); v != "node-7" || err != nil {
		t.Errorf("%q, %v", v, err)
	}
	if _, err := inCommandLine(line, "vol"); err == nil {
		t.Error("a part of a name was found")
	}
}

// What the host says of the machine becomes a part of an ID, or an error.
func TestTheHostsWordsAreBounded(t *testing.T) {
	for _, said := range []string{"", "a/b", "..", "a b", strings.Repeat("a", 65), "ä", "{x}"} {
		words["test"] = func(context.Context, *Config) (string, error) { return said, nil }
		c := &Config{Volumes: []Volume{{ID: "v-{test}", Name: "v"}}}
		if err := c.Resolve(t.Context()); err == nil {
			t.Errorf("%q became %q", said, c.Volumes[0].ID)
		}
	}
	delete(words, "test")
}

func FuzzFill(f *testing.F) {
	f.Add("root-{tpm.ek}")
	f.Add("{{}}")
	f.Fuzz(func(t *testing.T, id string) {
		out, err := fill(id, func(word string) (string, error) {
			if word != "w" {
				return "", errors.New("unknown")
			}
			return "x", nil
		})
		if err == nil && policy.ValidVolume(out) && strings.ContainsAny(out, "{}") {
			t.Fatalf("%q becomes %q", id, out)
		}
	})
}
