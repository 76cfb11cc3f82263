//go:build umlguest

package luks

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// openerEnv names the helper program of the benchmark, test/uml/opener.
const openerEnv = "KEYAGENT_TEST_OPENER"

// TestBenchmarkOpen compares opening a volume by this package with cryptsetup
// doing the same, and prints lines of "BENCH name value unit". Both are run as
// processes that start, open and end; what a process costs without opening
// anything is measured beside them.
func TestBenchmarkOpen(t *testing.T) {
	opener := os.Getenv(openerEnv)
	if opener == "" {
		t.Fatalf("%s is not set: this test is run by test/uml", openerEnv)
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

	spent := func(rounds int, open, undo []string) time.Duration {
		var times []time.Duration
		for range rounds {
			began := time.Now()
			run(t, open[0], open[1:]...)
			times = append(times, time.Since(began))
			if undo != nil {
				run(t, undo[0], undo[1:]...)
			}
		}
		slices.Sort(times)
		return times[len(times)/2]
	}
	report := func(name string, value float64, unit string) { fmt.Printf("BENCH %s %.2f %s\n", name, value, unit) }
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

	closing := []string{"cryptsetup", "close", "bench"}
	weAre := spent(15, []string{opener, "open", ours, keys, mac, "bench"}, closing)
	stockIs := spent(15, []string{"cryptsetup", "open", "--key-file", keys, stock, "bench"}, closing)
	slowIs := spent(3, []string{"cryptsetup", "open", "--key-file", keys, slow, "bench"}, closing)
	idle := spent(15, []string{"cryptsetup", "--version"}, nil)
	weIdle := spent(15, []string{opener, "nothing"}, nil)
	report("open-process-keyagent", ms(weAre), "ms")
	report("open-process-cryptsetup-pbkdf2-1000", ms(stockIs), "ms")
	report("open-process-cryptsetup-argon2id-default", ms(slowIs), "ms")
	report("process-cryptsetup-that-does-nothing", ms(idle), "ms")
	report("process-keyagent-that-does-nothing", ms(weIdle), "ms")
	report("ratio-keyagent-to-cryptsetup-pbkdf2-1000-without-the-process", float64(weAre-weIdle)/float64(stockIs-idle), "x")
	report("ratio-keyagent-to-cryptsetup-pbkdf2-1000", float64(weAre)/float64(stockIs), "x")
	report("ratio-cryptsetup-argon2id-default-to-keyagent", float64(slowIs)/float64(weAre), "x")

	// The same without a process around it, as the agent does it; and
	// libcryptsetup alone on the same volume, which shows what the guard costs.
	v := newVolume(t, idData, dataKey(t))
	inProcess := func(open func() error) time.Duration {
		var times []time.Duration
		for range 30 {
			began := time.Now()
			err := open()
			times = append(times, time.Since(began))
			must(t, err)
			must(t, Close(context.Background(), "bench"))
		}
		slices.Sort(times)
		return times[len(times)/2]
	}
	guardedIs := inProcess(func() error { _, err := v.open("bench"); return err })
	bareIs := inProcess(func() error {
		return withSession(v.device, "", func(s *session) error {
			if err := s.load(v.id.UUID); err != nil {
				return err
			}
			return s.unlock("bench", v.dek, activation{})
		})
	})
	report("open-in-process-keyagent", ms(guardedIs), "ms")
	report("open-in-process-libcryptsetup-alone", ms(bareIs), "ms")
	report("ratio-in-process-keyagent-to-libcryptsetup-alone", float64(guardedIs)/float64(bareIs), "x")
}
