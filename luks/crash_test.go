package luks

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
)

// formatEnv makes the test binary a program that formats the image it names.
const formatEnv = "KEYAGENT_TEST_FORMAT"

// cloneEnv makes it one that makes a volume of its own of the clone that it names.
const cloneEnv = "KEYAGENT_TEST_CLONE"

// hangEnv makes it one that reads the header of a device that does not answer.
const hangEnv = "KEYAGENT_TEST_HANG"

func TestMain(m *testing.M) {
	if path := os.Getenv(formatEnv); path != "" {
		// strace counts the calls of each thread: all writes are the worker's.
		dek, err := secret.From([]byte("a DEK of thirty-two bytes, 01234"))
		if err == nil {
			_, err = formatImage(path, idData, dek)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if path := os.Getenv(cloneEnv); path != "" {
		err := cloneImage(path)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if path := os.Getenv(hangEnv); path != "" {
		dek, err := secret.From([]byte("a DEK of thirty-two bytes, 01234"))
		if err == nil {
			_, err = ReadHeader(context.Background(), HeaderRequest{path, idData, MACs{Header: MAC{1}}}, dek)
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// formatKilledAt runs a format in a process of its own, which is killed as it
// enters the n-th system call of one kind on the image. It says whether the
// format got to its end instead.
func formatKilledAt(t *testing.T, path, call string, n int) (completed bool) {
	t.Helper()
	return killedAt(t, formatEnv, path, call, n)
}

func killedAt(t *testing.T, what, path, call string, n int) (completed bool) {
	t.Helper()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Fatal("strace is needed: run `make deps`")
	}
	log := filepath.Join(t.TempDir(), "strace")
	cmd := exec.Command(strace, "-f", "-qq", "-o", log, "-P", path, "-e", "trace="+call,
		"-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", call, n), os.Args[0])
	cmd.Env = append(os.Environ(), what+"="+path)
	out, err := cmd.CombinedOutput()
	if err == nil {
		return true
	}
	if trace, _ := os.ReadFile(log); !strings.Contains(string(trace), "killed by SIGKILL") {
		t.Fatalf("it was to be killed at %s %d, but: %v: %s", call, n, err, out)
	}
	return false
}

// Case 38, for format: killed at every write and every flush, it converges.
func TestAFormatKilledAtEveryWriteConverges(t *testing.T) {
	dek, err := secret.From([]byte("a DEK of thirty-two bytes, 01234"))
	must(t, err)
	defer dek.Close()
	seen := map[State]int{}
	kills := map[string]int{}
	for _, call := range []string{"pwrite64", "fsync", "write", "writev", "pwritev", "fdatasync", "sync_file_range", "fallocate", "ftruncate"} {
		for n := 1; ; n++ {
			path := image(t, minDevice)
			if formatKilledAt(t, path, call, n) {
				break
			}
			kills[call]++
			state, err := Probe(context.Background(), path, idData, dek)
			must(t, err)
			seen[state]++
			if state != StateLUKS2 { // killed once more at the same point
				formatKilledAt(t, path, call, n)
			}
			converges(t, path, dek)
		}
	}
	t.Logf("killed at %v; states found after the first kill: %v", kills, seen)
	if kills["pwrite64"] != 3 || kills["fsync"] != 4 {
		t.Errorf("killed at %v; a format has 3 writes, each with a flush, and a flush before it reads back", kills)
	}
}

// converges does what a caller with a pending record does, and asserts that the
// volume then opens with the DEK and is not formatted again.
func converges(t *testing.T, path string, dek *secret.Bytes) {
	t.Helper()
	ctx := context.Background()
	state, err := Probe(ctx, path, idData, dek)
	must(t, err)
	var h *Header
	if state == StateLUKS2 {
		h, err = Adopt(ctx, path, idData, dek)
	} else {
		h, err = formatImage(path, idData, dek)
	}
	if err != nil {
		t.Fatalf("state %v: %v", state, err)
	}
	before := digest(t, path)
	patch(t, path, []byte("data"), dataOffset)
	_, err = formatImage(path, idData, dek)
	wantError(t, err, ErrNotBlank)
	patch(t, path, make([]byte, 4), dataOffset)
	got, err := Adopt(ctx, path, idData, dek)
	must(t, err)
	if got.MACs() != h.MACs() || digest(t, path) != before {
		t.Fatal("a completed header has changed")
	}
}
