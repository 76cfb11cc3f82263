package node

import (
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/lab/pki"
)

// A copy of the configuration elsewhere, such as in an initrd, needs all that it names,
// and what the policy in it names.
func TestFilesAreAllThatTheConfigurationNames(t *testing.T) {
	dir := t.TempDir()
	ca := pki.New(t)
	write := func(name string, data []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Certificate.Raw})
	want := []string{write("ca.pem", root), write("ek.pem", root), write("policy.yaml", []byte(`version: 2
lifetime: 1h
trust:
  tpm:
    roots: [{name: maker, file: maker.pem}]
profiles:
  - name: service
    tpm: {trust: ["root:maker"], bank: sha256, event_log: optional, pcrs: [{pcr: 7, accept: [`+strings.Repeat("ab", 32)+`]}]}
grants: [{name: keys, profiles: [service], volumes: ["*"], operations: [open]}]
...
`)), write("maker.pem", root)}
	c, err := Load(write("agent.yaml", []byte("servers: [{address: \"a:1\", ca: ca.pem}]\nserver_policy: policy.yaml\ntpm: {ek_intermediates: ["+want[1]+"]}\n")))
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Files()
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
