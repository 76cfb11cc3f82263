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

// TestBenchmarkIntegrity compares volumes without integrity, with it, and with it but
// without a journal: each writes and reads the same amount past the cache, in turns. It
// also times a first format of 10 GiB, XFS included.
func TestBenchmarkIntegrity(t *testing.T) {
	const size, amount, block = 700 << 20, 128 << 20, 1 << 20
	report := func(name string, value float64, unit string) { fmt.Printf("BENCH %s %.2f %s\n", name, value, unit) }
	// On one disk, one after the other: the guest's memory is that of all disks.
	kinds := []struct {
		name string
		opts OpenOptions
	}{{"plain", OpenOptions{}}, {"integrity", OpenOptions{}}, {"integrity-no-journal", OpenOptions{NoJournal: true}}}
	volumes := make([]volume, len(kinds))
	for i, k := range kinds {
		if k.name == "plain" {
			volumes[i] = newVolume(t, idData, dataKey(t))
			resizeDevice(t, volumes[i].device, size)
			continue
		}
		volumes[i] = newAuthenticated(t, size)
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
			req.FreshTags = round == 0 && k.name != "plain"
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
