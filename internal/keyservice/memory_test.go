package keyservice

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/cluster"
)

// area of a process's memory that can be written: where a heap, a stack or a secret
// would be.
type area struct{ from, to uint64 }

var areaLine = regexp.MustCompile(`^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)$`)

// areas leaves out the pages that hold secrets on purpose: those of memfd_secret, and
// where the kernel has none, those that are locked and stay out of dumps.
func areas(t *testing.T, pid int) []area {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out []area
	candidate := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if m := areaLine.FindStringSubmatch(lines.Text()); m != nil {
			var a area
			if _, err := fmt.Sscanf(m[1]+" "+m[2], "%x %x", &a.from, &a.to); err != nil {
				t.Fatal(err)
			}
			if candidate = m[3][:2] == "rw" && !strings.Contains(m[4], "secretmem"); candidate {
				out = append(out, a)
			}
		} else if flags, ok := strings.CutPrefix(lines.Text(), "VmFlags:"); ok && candidate && strings.Contains(flags+" ", " lo ") && strings.Contains(flags+" ", " dd ") {
			out = out[:len(out)-1]
		}
	}
	return out
}

// search counts each needle in the memory of a process.
func searchMemory(t *testing.T, pid int, needles map[string][]byte) map[string]int {
	t.Helper()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatalf("%v (hint: only root reads an undumpable process)", err)
	}
	defer mem.Close()
	found, read := map[string]int{}, uint64(0)
	for _, a := range areas(t, pid) {
		const chunk, overlap = 4 << 20, 128
		for at := a.from; at < a.to; at += chunk {
			buf := make([]byte, min(chunk+overlap, a.to-at))
			n, err := mem.ReadAt(buf, int64(at))
			if n == 0 && err != nil {
				break // unmapped since, or a guard
			}
			read += uint64(n)
			for name, needle := range needles {
				found[name] += bytes.Count(buf[:n], needle)
			}
		}
	}
	if read < 1<<20 {
		t.Fatalf("only %d bytes could be read", read)
	}
	return found
}

// keyForms are what is left of a key: itself, as text, and as HMAC holds it.
func keyForms(name string, key []byte) map[string][]byte {
	pad := func(b byte) []byte {
		out := bytes.Repeat([]byte{b}, 64)
		for i := range key {
			out[i] ^= key[i]
		}
		return out[:len(key)]
	}
	return map[string][]byte{
		name: key, name + ", first half": key[:len(key)/2], name + ", in hex": []byte(hex.EncodeToString(key)),
		name + ", inner pad": pad(0x36), name + ", outer pad": pad(0x5c),
	}
}

// The search finds what is there: a key in the heap, and the pads of an HMAC.
func TestTheSearchOfMemoryFindsWhatIsThere(t *testing.T) {
	key := make([]byte, 32)
	rand.Read(key)
	h := hmac.New(sha256.New, key)
	h.Write([]byte("x"))
	planted := bytes.Clone(key)
	forms := keyForms("planted", key)
	found := searchMemory(t, os.Getpid(), forms)
	runtime.KeepAlive(h)
	runtime.KeepAlive(planted)
	for _, name := range []string{"planted", "planted, inner pad", "planted, outer pad"} {
		if found[name] < 2 { // the needle itself, and what it is to find
			t.Errorf("%s is found %d times", name, found[name])
		}
	}
}

// service is keyagent serve as a process of its own.
func (w *world) process(more ...string) (pid int) {
	w.t.Helper()
	w.stop()
	program := filepath.Join(w.t.TempDir(), "keyagent")
	build := exec.Command("go", "build", "-o", program, "../../cmd/keyagent")
	build.Env = append(os.Environ(), "GOEXPERIMENT=runtimesecret")
	if out, err := build.CombinedOutput(); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	config := fmt.Sprintf("listen: 127.0.0.1:0\ntls: {certificate: server.pem, key: server.key}\npolicy: policy.yaml\nkms: %q\nstorage: %q\naudit: audit.log\n", w.cfg.KMS, w.cfg.Storage)
	config += strings.Join(more, "\n")
	path := filepath.Join(w.dir, "serve.yaml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.Command(program, "serve", "--config", path)
	out, err := cmd.StderrPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	address := regexp.MustCompile(`msg=serving address=(\S+)`)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			w.t.Fatalf("it ended before it served: %v", err)
		}
		if m := address.FindStringSubmatch(line); m != nil {
			w.address = m[1]
			break
		}
	}
	drained := make(chan struct{})
	go func() { defer close(drained); _, _ = io.Copy(io.Discard, lines) }()
	w.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-drained
		_ = cmd.Wait()
	})
	return cmd.Process.Pid
}

// Case 45: the service's own memory holds no key outside of
// the pages that are there for keys.
func TestTheServiceForgetsItsKeys(t *testing.T) {
	w := newWorld(t)
	pid := w.process()
	needles := w.secrets(4)
	forgotten := func(when string, names ...string) {
		t.Helper()
		// What a computation left waits for the next collection, which comes soon.
		deadline := time.Now().Add(10 * forgetEvery)
		for {
			left := ""
			for name, n := range searchMemory(t, pid, needles) {
				wanted := len(names) == 0
				for _, prefix := range names {
					wanted = wanted || strings.HasPrefix(name, prefix)
				}
				if n > 0 && wanted {
					left += fmt.Sprintf("\n%s: %d times", name, n)
				}
			}
			if left == "" {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s, its memory holds%s", when, left)
			}
		}
	}
	if n := searchMemory(t, pid, map[string][]byte{"configuration": []byte("storage://file?dir=" + w.dir)})["configuration"]; n == 0 {
		t.Error("the search does not find what the service must know")
	}
	forgotten("after its start")
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	for i := range 4 {
		m := w.machine()
		load.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				if _, _, err := w.getIn(ctx, m, fmt.Sprintf("data-%d", i), formatOp); err != nil && ctx.Err() == nil {
					t.Error(err)
					return
				}
			}
		})
	}
	forgotten("under load", "master secret")
	forgotten("under load", "master secret") // again, with more load
	cancel()
	load.Wait()
	forgotten("after the load")
}

// secrets are the forms of all keys of a service with volumes data-0 to data-N.
func (w *world) secrets(volumes int) map[string][]byte {
	w.t.Helper()
	master, err := cluster.LoadMasterSecret(filepath.Join(w.dir, "master"))
	if err != nil {
		w.t.Fatal(err)
	}
	defer master.Close()
	k, err := cluster.New(cluster.Options{MasterSecret: master})
	if err != nil {
		w.t.Fatal(err)
	}
	defer k.Close()
	all := map[string][]byte{}
	add := func(name string, key []byte) {
		for form, b := range keyForms(name, key) {
			all[form] = b
		}
	}
	_ = master.Use(func(b []byte) error {
		add("master secret", bytes.Clone(b))
		prk, err := hkdf.Extract(sha256.New, b, nil)
		if err != nil {
			w.t.Fatal(err)
		}
		add("master PRK", prk)
		return nil
	})
	for i := range volumes + 1 {
		name, b := "record MAC key", kms.Binding{VolumeID: "keyservice", Purpose: kms.RecordMAC, Version: 1, Length: 32}
		if i < volumes {
			name = fmt.Sprintf("DEK %d", i)
			b = kms.Binding{VolumeID: fmt.Sprintf("data-%d", i), Purpose: kms.VolumeDEK, Version: 1, Length: 32}
		}
		key, _, err := k.Generate(w.t.Context(), b)
		if err != nil {
			w.t.Fatal(err)
		}
		_ = key.Use(func(p []byte) error { add(name, bytes.Clone(p)); return nil })
		key.Close()
	}
	return all
}
