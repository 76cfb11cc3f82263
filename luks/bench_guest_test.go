//go:build umlguest

package luks

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// openerEnv names the helper program of the benchmark, test/suite/luks/opener.
const openerEnv = "KEYAGENT_TEST_OPENER"

// TestBenchmarkOpen compares opening a volume by this package with cryptsetup
// doing the same, and prints lines of "BENCH name value unit". Both are run as
// processes that start, open and end; what a process costs without opening
// anything is measured beside them.
func TestBenchmarkOpen(t *testing.T) {
	opener := os.Getenv(openerEnv)
	if opener == "" {
		t.Fatalf("%s is not set: this test is run by test/suite/luks", openerEnv)
	}
	keys := filepath.Join(t.TempDir(), "key")
	dek := make([]byte, 32)
	_, _ = rand.Read(dek)
	must(t, os.WriteFile(keys, dek, 0o600))

	ours, stock, slow := blankDevice(t, deviceSize), blankDevice(t, deviceSize), blankDevice(t, deviceSize)
	mac := run(t, opener, "format", ours, keys)
	format := []string{"luksFormat", "-q", "--type", "luks2", "--sector-size", "4096", "--key-file", keys}
	run(t, "cryptsetup", append(format, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", stock)...)
	run(t, "cryptsetup", append(format, slow)...)
	t.Log(run(t, "cryptsetup", "luksDump", slow))

	// Contestants take turns, so that whatever else the machine does befalls all.
	medians := func(rounds int, undo func(), opens ...func()) []time.Duration {
		times := make([][]time.Duration, len(opens))
		for range rounds {
			for i, open := range opens {
				began := time.Now()
				open()
				times[i] = append(times[i], time.Since(began))
				undo()
			}
		}
		result := make([]time.Duration, len(opens))
		for i := range times {
			slices.Sort(times[i])
			result[i] = times[i][rounds/2]
		}
		return result
	}
	process := func(command ...string) func() {
		return func() { run(t, command[0], command[1:]...) }
	}
	report := func(name string, value float64, unit string) { fmt.Printf("BENCH %s %.2f %s\n", name, value, unit) }
	ratio := func(a, b time.Duration) float64 { return float64(a) / float64(b) }
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

	closing := process("cryptsetup", "close", "bench")
	m := medians(21, closing,
		process(opener, "open", ours, keys, mac, "bench"),
		process("cryptsetup", "open", "--key-file", keys, stock, "bench"))
	a := medians(3, closing, process("cryptsetup", "open", "--key-file", keys, slow, "bench"))
	idle := medians(21, func() {}, process(opener, "nothing"), process("cryptsetup", "--version"))
	report("open-process-keyagent", ms(m[0]), "ms")
	report("open-process-cryptsetup-pbkdf2-1000", ms(m[1]), "ms")
	report("open-process-cryptsetup-argon2id-default", ms(a[0]), "ms")
	report("process-keyagent-that-does-nothing", ms(idle[0]), "ms")
	report("process-cryptsetup-that-does-nothing", ms(idle[1]), "ms")
	report("ratio-process-keyagent-to-cryptsetup-pbkdf2-1000", ratio(m[0], m[1]), "x")
	report("ratio-process-cryptsetup-argon2id-default-to-keyagent", ratio(a[0], m[0]), "x")

	// The same without a process around it, as the agent does it.
	v := newVolume(t, idData, dataKey(t))
	m = medians(51, func() { must(t, v.close("bench")) }, func() {
		_, err := v.open("bench")
		must(t, err)
	})
	report("open-in-process-keyagent", ms(m[0]), "ms")
}
