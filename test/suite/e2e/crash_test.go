//go:build linux && amd64

package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/keyagent/keyagent/test/sim/swtpm"
	"github.com/keyagent/keyagent/test/sim/uml"
)

// crashBudget is what the walk over the points at which a first provision is killed
// may take. What does not fit is sampled, and the log says how much that was.
const crashBudget = "3m"

// Show 6, cases 38 and 40: the agent is killed at each call that writes, on a real
// dm-crypt, with a key service and a TPM beside it in the same guest.
func TestAKilledAgentConverges(t *testing.T) {
	maker := t.TempDir()
	a, err := swtpm.NewAuthority(maker)
	must(t, err)
	must(t, os.Mkdir(filepath.Join(maker, "state"), 0o700))
	must(t, a.Manufacture(filepath.Join(maker, "state")))
	binary := filepath.Join(t.TempDir(), "crash.test")
	if out, err := exec.Command("go", "test", "-c", "-tags", "umlguest", "-o", binary, "./crash").CombinedOutput(); err != nil {
		t.Fatalf("go test -c: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	result, err := uml.Run(ctx, uml.Guest{
		Program: binary,
		Args:    []string{"-test.v"},
		Env:     []string{"KEYAGENT_TEST_PROGRAM=" + program, "KEYAGENT_TEST_TPM=" + maker, "KEYAGENT_TEST_BUDGET=" + crashBudget},
	})
	must(t, err)
	t.Logf("guest ran for %v:\n%s", result.Elapsed.Round(100*time.Millisecond), result.Output)
	if result.ExitCode != 0 {
		t.Fatalf("guest tests failed with exit code %d", result.ExitCode)
	}
}
