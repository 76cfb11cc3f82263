//go:build umlguest

package luks

import (
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
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

// TestBenchmarkOpenMany opens 32 volumes at once, as an agent does at a boot: beside it 32
// processes of dmsetup, which have the volume key already. cryptsetup's default, argon2id,
// does not fit into memory 32 times: one is timed, and they would take turns.
func TestBenchmarkOpenMany(t *testing.T) {
	const many, rounds = 32, 5
	volumes, slow := make([]volume, many), blankDevice(t, deviceSize)
	key := filepath.Join(t.TempDir(), "key")
	must(t, os.WriteFile(key, []byte("thirty-two bytes for a key file."), 0o600))
	hexKey := strings.Repeat("0123456789abcdef", 8)
	for i := range volumes {
		volumes[i] = newVolume(t, Identity{Volume: fmt.Sprintf("v%d", i), UUID: fmt.Sprintf("6f1d3a52-1c6b-4f0c-9a53-%012x", i), Generation: 1}, dataKey(t))
	}
	run(t, "cryptsetup", "luksFormat", "-q", "--type", "luks2", "--key-file", key, slow)
	atOnce := func(f func(i int) error) time.Duration {
		began := time.Now()
		var all errgroup.Group
		for i := range many {
			all.Go(func() error { return f(i) })
		}
		must(t, all.Wait())
		return time.Since(began)
	}
	var rss int64 // of the largest process, in KiB
	process := func(name string, args ...string) error {
		cmd := exec.Command(name, args...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", name, err, out)
		}
		if u, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
			for have := atomic.LoadInt64(&rss); u.Maxrss > have && !atomic.CompareAndSwapInt64(&rss, have, u.Maxrss); have = atomic.LoadInt64(&rss) {
			}
		}
		return nil
	}
	name := func(kind string, i int) string { return fmt.Sprintf("%s-%d", kind, i) }
	report := func(name string, value float64, unit string) { fmt.Printf("BENCH %s %.2f %s\n", name, value, unit) }

	var ours, raw []time.Duration
	must(t, os.WriteFile("/proc/self/clear_refs", []byte("5"), 0o600)) // the peak from here on
	for range rounds {
		ours = append(ours, atOnce(func(i int) error { _, err := volumes[i].open(name("ours", i)); return err }))
		atOnce(func(i int) error { return volumes[i].close(name("ours", i)) })
		raw = append(raw, atOnce(func(i int) error {
			table := fmt.Sprintf("0 2048 crypt aes-xts-plain64 %s 0 %s 32768 1 sector_size:4096", hexKey, volumes[i].device)
			return process("dmsetup", "create", name("raw", i), "--table", table)
		}))
		atOnce(func(i int) error { return process("dmsetup", "remove", "--retry", name("raw", i)) })
	}
	slices.Sort(ours)
	slices.Sort(raw)
	report("open-32-keyagent", ours[rounds/2].Seconds()*1000, "ms")
	report("open-32-dmsetup", raw[rounds/2].Seconds()*1000, "ms")
	report("ratio-open-32-keyagent-to-dmsetup", float64(ours[rounds/2])/float64(raw[rounds/2]), "x")
	report("peak-memory-keyagent", float64(peak(t))/1024, "MiB")

	// One with the default, whose cost cryptsetup chose for this machine: 32 take their turns.
	rss = 0
	began := time.Now()
	must(t, process("cryptsetup", "open", "--key-file", key, slow, "slow"))
	one := time.Since(began)
	must(t, process("cryptsetup", "close", "slow"))
	report("open-1-cryptsetup-default", one.Seconds()*1000, "ms")
	report("ratio-open-32-cryptsetup-default-by-turns-to-keyagent", float64(many*one)/float64(ours[rounds/2]), "x")
	report("peak-memory-one-cryptsetup-default", float64(rss)/1024, "MiB")
}

// peak is the largest resident set of this process, in KiB.
func peak(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			must(t, err)
			return n
		}
	}
	t.Fatal("the kernel does not say VmHWM")
	return 0
}

// TestBenchmarkIntegrity compares volumes without integrity, with it, and with it but
// without a journal: each writes and reads the same amount past the cache, in turns. It
// also times a first format of 10 GiB, XFS included.
func TestBenchmarkIntegrity(t *testing.T) {
	const size, amount, block = 700 << 20, 128 << 20, 1 << 20
	report := func(name string, value float64, unit string) { fmt.Printf("BENCH %s %.2f %s\n", name, value, unit) }
	// On one disk, one after the other: the guest's memory is that of all disks.
	kinds := []struct {
		name      string
		integrity Integrity
		opts      OpenOptions
	}{
		{"plain", "", OpenOptions{}}, {"integrity", HMACSHA256, OpenOptions{}}, {"integrity-no-journal", HMACSHA256, OpenOptions{NoJournal: true}},
		{"aegis128-no-journal", AEGIS128, OpenOptions{NoJournal: true}},
	}
	volumes := make([]volume, len(kinds))
	for i, k := range kinds {
		if k.integrity == "" {
			volumes[i] = newVolume(t, idData, dataKey(t))
			resizeDevice(t, volumes[i].device, size)
			continue
		}
		volumes[i] = newAuthenticated(t, size, k.integrity)
	}
	p, err := unix.Mmap(-1, 0, block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	must(t, err)
	_, _ = rand.Read(p)
	pass := func(path string, io func(int, []byte, int64) (int, error)) time.Duration {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT, 0)
		must(t, err)
		defer unix.Close(fd)
		began := time.Now()
		for at := int64(0); at < amount; at += block {
			_, err := io(fd, p, at)
			must(t, err)
		}
		must(t, unix.Fsync(fd))
		return time.Since(began)
	}
	writes, reads := make([][]time.Duration, len(kinds)), make([][]time.Duration, len(kinds))
	for round := range 4 {
		for i, k := range kinds {
			req := volumes[i].request("data", k.opts)
			req.FreshTags = round == 0 && k.integrity != ""
			m, _, err := Open(t.Context(), req, volumes[i].dek)
			must(t, err)
			w, r := pass(m.Path, unix.Pwrite), pass(m.Path, unix.Pread)
			must(t, volumes[i].close("data"))
			if round > 0 { // the first one allocates the disk's memory
				writes[i], reads[i] = append(writes[i], w), append(reads[i], r)
			}
		}
	}
	median := func(d []time.Duration) time.Duration { slices.Sort(d); return d[len(d)/2] }
	rate := func(d time.Duration) float64 { return amount / d.Seconds() / (1 << 20) }
	for i, k := range kinds {
		w, r := median(writes[i]), median(reads[i])
		report("write-"+k.name, rate(w), "MiB/s")
		report("read-"+k.name, rate(r), "MiB/s")
		if i > 0 {
			report("ratio-write-"+k.name+"-to-plain", float64(w)/float64(median(writes[0])), "x")
			report("ratio-read-"+k.name+"-to-plain", float64(r)/float64(median(reads[0])), "x")
		}
	}

	device := blankDevice(t, 10<<30)
	began := time.Now()
	h, err := NewHeader(t.Context(), idLogs, Layout{HMACSHA256, 10 << 30}, logsKey(t))
	must(t, err)
	must(t, Write(t.Context(), WriteRequest{device, idLogs, h, DeadlineIn(time.Minute)}, logsKey(t)))
	m, _, err := Open(t.Context(), OpenRequest{Device: device, Name: "logs", Identity: idLogs, MACs: h.MACs(), FreshTags: true}, logsKey(t))
	must(t, err)
	must(t, Wipe(t.Context(), m, false, nil))
	run(t, "mkfs.xfs", "-q", "-f", "-K", m.Path)
	report("format-10-GiB-with-integrity-and-xfs", time.Since(began).Seconds(), "s")
	must(t, Close(t.Context(), CloseRequest{Name: "logs", UUID: idLogs.UUID}))
}
