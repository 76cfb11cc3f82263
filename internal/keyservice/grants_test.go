package keyservice

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/failure"
)

// A volume belongs to the grant under which it was made. Who asks for the key of one
// that is in use has it by a grant to open, and by the word that this grant adopts
// the other one's volumes, whichever operation is asked for.
func TestAFormatRequestOpensNoVolumeThatAnOpenRequestDoesNot(t *testing.T) {
	w := newWorld(t)
	m := w.machine()
	path := filepath.Join(w.dir, "policy.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, _, _ := strings.Cut(string(text), "grants:")
	grants := func(use string) {
		t.Helper()
		policy := head + `grants:
  - {name: make, profiles: [guest], volumes: ["data-*"], operations: [format]}
  - {name: use, profiles: [guest], volumes: ["data-*"], operations: [open]` + use + "}\n"
		if err := os.WriteFile(path, []byte(policy), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := w.server.Reload(); err != nil {
			t.Fatal(err)
		}
	}
	grants("")
	w.provision(m, "data-1")
	_, _, err = w.get(m, "data-1", openOp)
	wantClass(t, err, failure.PolicyDenied)
	_, _, err = w.get(m, "data-1", formatOp)
	wantClass(t, err, failure.PolicyDenied)
	grants(", adopts: [make]")
	_, opened, err := w.get(m, "data-1", openOp)
	if err != nil {
		t.Fatal(err)
	}
	if _, again, err := w.get(m, "data-1", formatOp); err != nil || again != opened {
		t.Errorf("with the word that it adopts: %v", err)
	}
}
