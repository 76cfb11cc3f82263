//go:build !umlguest

package hardware

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/test/sim/uml"
)

func build(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Dir = "../../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s(hint: make deps installs what it needs)", strings.Join(args, " "), err, out)
	}
}

// A confidential VM of each shape proves itself to a key service and opens its
// disk; with one bit of the evidence changed it does not. All of it is the
// released program in a guest with a real dm-crypt, except the processor.
func TestEachShapeOfMachineOpensItsDisk(t *testing.T) {
	dir := t.TempDir()
	program, guest := filepath.Join(dir, "keyagent"), filepath.Join(dir, "hardware.test")
	build(t, "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./cmd/keyagent")
	build(t, "test", "-c", "-tags", "umlguest", "-o", guest, "./test/suite/hardware")
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	result, err := uml.Run(ctx, uml.Guest{
		Program: "/bin/sh",
		Args: []string{"-c", `set -e
/run/modprobe -a fuse configfs ext4
ip link set lo up
mount -t tmpfs config /sys/kernel/config
# The programs lie below /tmp, which the makers of software TPMs write to.
mkdir /run/programs
mount --bind "$0" /run/programs
mount -t tmpfs tmp /tmp
exec /run/programs/hardware.test -test.v -test.run '^TestGuest'`, dir},
		Env:    []string{"KEYAGENT_TEST_PROGRAM=/run/programs/keyagent"},
		Memory: 2048,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("guest ran for %v:\n%s", result.Elapsed.Round(100*time.Millisecond), result.Output)
	if result.ExitCode != 0 {
		t.Fatalf("exit code %d", result.ExitCode)
	}
	for _, shape := range []string{"SNPAlone", "TDXAlone", "Azure", "Google", "SVSM", "ControlPlane"} {
		if !strings.Contains(result.Output, "--- PASS: TestGuest"+shape+" ") {
			t.Errorf("TestGuest%s did not pass", shape)
		}
	}
}
