package luks

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/test/sim/uml"
)

// build compiles the guest's half of a test: the tests of luks that are marked
// umlguest.
func build(t testing.TB) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "luks.test")
	goTool(t, "test", "-c", "-tags", "umlguest", "-o", binary, "github.com/keyagent/keyagent/luks")
	return binary
}

func goTool(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func boot(t testing.TB, g uml.Guest, limit time.Duration) uml.Result {
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
		Memory:  1024, // its own heap and all its disks are in there
	}, 6*time.Minute)
}

func TestVolumesInARealKernel(t *testing.T) {
	boot(t, uml.Guest{
		Program: build(t),
		Args:    []string{"-test.v", "-test.run", "^TestLive"},
		Memory:  1024, // its own heap and all its disks are in there
	}, 6*time.Minute)
}

// BenchmarkOpen runs the guest's comparison once and reports each of its lines
// as a metric:
//
//	go test -run '^$' -bench Open -benchtime 1x ./test/suite/luks
func BenchmarkOpen(b *testing.B) {
	opener := filepath.Join(b.TempDir(), "opener")
	goTool(b, "build", "-o", opener, "github.com/keyagent/keyagent/test/suite/luks/opener")
	bench(b, uml.Guest{
		Program: build(b),
		Args:    []string{"-test.v", "-test.run", "^TestBenchmarkOpen$"},
		Env:     []string{"KEYAGENT_TEST_OPENER=" + opener},
		Memory:  2048, // argon2id takes up to half of it
	})
}

// BenchmarkOpenMany opens 32 volumes at once.
func BenchmarkOpenMany(b *testing.B) {
	bench(b, uml.Guest{Program: build(b), Args: []string{"-test.v", "-test.run", "^TestBenchmarkOpenMany$"}, Memory: 3072})
}

// BenchmarkIntegrity is the like for what integrity costs.
func BenchmarkIntegrity(b *testing.B) {
	bench(b, uml.Guest{Program: build(b), Args: []string{"-test.v", "-test.run", "^TestBenchmarkIntegrity$"}, Memory: 3072})
}

func bench(b *testing.B, guest uml.Guest) {
	for b.Loop() {
		result := boot(b, guest, 10*time.Minute)
		for line := range strings.Lines(result.Output) {
			fields := strings.Fields(line)
			if len(fields) != 4 || fields[0] != "BENCH" {
				continue
			}
			value, err := strconv.ParseFloat(fields[2], 64)
			if err != nil {
				b.Fatal(err)
			}
			fmt.Print(line)
			b.ReportMetric(value, fields[1]+"-"+fields[3])
		}
	}
}
