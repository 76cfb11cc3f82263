package uml_test

import (
	"context"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/keyagent/keyagent/test/uml"
)

// build compiles the guest's half of a test: the tests of luks that are marked
// umlguest.
func build(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "luks.test")
	out, err := exec.Command("go", "test", "-c", "-tags", "umlguest", "-o", binary, "github.com/keyagent/keyagent/luks").CombinedOutput()
	if err != nil {
		t.Fatalf("build guest tests: %v\n%s", err, out)
	}
	return binary
}

func boot(t *testing.T, g uml.Guest, limit time.Duration) uml.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	result, err := uml.Run(ctx, g)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("guest ran for %v:\n%s", result.Elapsed.Round(100*time.Millisecond), result.Output)
	if result.ExitCode != 0 {
		t.Fatalf("guest tests failed with exit code %d", result.ExitCode)
	}
	return result
}

func TestHostileDisksInARealKernel(t *testing.T) {
	boot(t, uml.Guest{
		Program: build(t),
		Args:    []string{"-test.v", "-test.run", "^TestAttack"},
	}, 3*time.Minute)
}

func TestVolumesInARealKernel(t *testing.T) {
	boot(t, uml.Guest{
		Program: build(t),
		Args:    []string{"-test.v", "-test.run", "^TestLive"},
	}, 3*time.Minute)
}
