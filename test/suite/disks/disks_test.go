//go:build !umlguest

package disks

import (
	"context"
	"io"
	"os"
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

// boot runs the guest's half of the tests whose names match. KEYAGENT_TEST_RUN names
// some of them, while one works on these.
func boot(t *testing.T, match string, limit time.Duration) {
	t.Helper()
	if only := os.Getenv("KEYAGENT_TEST_RUN"); only != "" {
		match = only
	}
	dir := t.TempDir()
	// Without the clouds' clients, as on a node: each start of the program costs the
	// guest's kernel a page fault for each page of it.
	build(t, "build", "-trimpath", "-tags", "grpcnotrace,keyagent_noaws,keyagent_noazure,keyagent_nogcp,keyagent_noetcd", "-ldflags", "-s -w", "-o", filepath.Join(dir, "keyagent"), "./cmd/keyagent")
	build(t, "test", "-c", "-tags", "grpcnotrace,umlguest", "-o", filepath.Join(dir, "disks.test"), "./test/suite/disks")
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	data, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	env := []string{"KEYAGENT_TEST_PROGRAM=/run/programs/keyagent", "KEYAGENT_TEST_DATA=/run/testdata"}
	if old := os.Getenv("KEYAGENT_TEST_OLD_PROGRAM"); old != "" {
		data, err := os.ReadFile(old)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "keyagent-old"), data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		env = append(env, "KEYAGENT_TEST_OLD_PROGRAM=/run/programs/keyagent-old")
	}
	for _, name := range []string{"KEYAGENT_TEST_SEED", "KEYAGENT_TEST_ROUNDS"} {
		if v := os.Getenv(name); v != "" {
			env = append(env, name+"="+v)
		}
	}
	var tee io.Writer
	if testing.Verbose() {
		tee = os.Stderr
	}
	result, err := uml.Run(ctx, uml.Guest{
		Tee:     tee,
		Program: "/bin/sh",
		Args: []string{"-c", `set -e
/run/modprobe -a ext4 dm-delay
ip link set lo up
mkdir /run/programs
mount --bind "$0" /run/programs
mkdir /run/testdata
mount --bind "$2" /run/testdata
mount -t tmpfs -o size=90% tmp /tmp
cat /proc/sys/kernel/random/boot_id >/run/machine-id
exec /run/programs/disks.test -test.v -test.timeout 0 -test.run "$1"`, dir, match, data},
		Env:    env,
		Memory: 3072,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("guest ran for %v:\n%s", result.Elapsed.Round(100*time.Millisecond), result.Output)
	if result.ExitCode != 0 || !strings.Contains(result.Output, "--- PASS: ") || strings.Contains(result.Output, "no tests to run") {
		t.Fatalf("exit code %d", result.ExitCode)
	}
}

// Everything that can go wrong with a disk, in one guest.
func TestVolumesOnRealDisks(t *testing.T) { boot(t, "^TestDisk", 25*time.Minute) }

// Nodes that race for one disk, in another.
func TestNodesThatRaceForOneDisk(t *testing.T) { boot(t, "^TestRace", 5*time.Hour) }

// Parts that are killed at calls of the system, in a third: what is traced and killed there
// leaves this kernel in a state that other tests need not bear.
func TestPartsThatAreCutOff(t *testing.T) { boot(t, "^TestKill", 5*time.Hour) }
