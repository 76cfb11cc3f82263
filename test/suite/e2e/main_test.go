//go:build linux && amd64

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/keyagent/keyagent/internal/lab"
	"github.com/keyagent/keyagent/test/suite/e2e/inject"
)

// program is the keyagent under test, built as it is released.
var program string

func TestMain(m *testing.M) {
	inject.Main()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if err := lab.Check(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	dir, err := os.MkdirTemp("", "keyagent-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "keyagent")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./cmd/keyagent")
	build.Dir = moduleRoot
	build.Env = append(os.Environ(), "GOEXPERIMENT=runtimesecret")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build keyagent: %v\n%s(hint: make deps installs what it needs)\n", err, out)
		return 1
	}
	return m.Run()
}

// moduleRoot as seen from the folder in which the tests run.
const moduleRoot = "../../.."
