//go:build umlguest

package disks

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/lab/pki"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// These run inside a guest, which disks_test.go boots.

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		check(t, err)
		return v
	}
}

func program() string { return os.Getenv("KEYAGENT_TEST_PROGRAM") }

// tool runs a program of the system.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// log is the output of a process that runs on.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// world is a key service, and who makes the TPMs that it trusts.
type world struct {
	dir, port string
	maker     *swtpm.Authority
	log       *log
	process   *exec.Cmd
	program   string // of the key service, if it is another one
}

const policy = `version: 1
lifetime: 1h
trust:
  tpm:
    roots: [{name: lab, file: %s}]
profiles:
  - name: node
    tpm:
      trust: ["root:lab"]
      bank: sha256
      event_log: optional
      # One extension by zeros, which is what each node's firmware measures.
      pcrs: [{pcr: 4, accept: ["f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"]}]
grants:
  - {name: one, profiles: [node], volumes: ["v-*"], operations: [open, format, clone, rotate, retire]}
  - {name: many, profiles: [node], volumes: ["many-*"], operations: [open, format], writers: many}
  - {name: expiry, profiles: [node], volumes: ["x-*"], operations: [open, format], takeover: expiry, lease: 30s}
  - {name: outage, profiles: [node], volumes: ["off-*"], operations: [open, format], offline: {for: 24h, boots: 3}}
  - {name: brief, profiles: [node], volumes: ["r-*"], operations: [open, format], lease: 30s}
`

// lab is the key service and the two nodes that all tests of a guest share: making a
// TPM takes longer than most tests do.
var lab = sync.OnceValues(func() (*world, [2]*machine) {
	t := &onlyFatal{}
	w := newWorld(t)
	return w, [2]*machine{w.node(t, "node-1"), w.node(t, "node-2")}
})

// onlyFatal is a testing.TB for what lives as long as the guest does.
type onlyFatal struct{ testing.TB }

func (*onlyFatal) Helper()                      {}
func (*onlyFatal) Cleanup(func())               {}
func (*onlyFatal) Logf(string, ...any)          {}
func (*onlyFatal) Fatal(args ...any)            { panic(fmt.Sprint(args...)) }
func (*onlyFatal) Fatalf(f string, args ...any) { panic(fmt.Sprintf(f, args...)) }
func (o *onlyFatal) TempDir() string            { return must[string](o)(os.MkdirTemp("", "lab")) }

// first is the node that most tests are about.
func first(t *testing.T) *machine {
	t.Helper()
	_, nodes := lab()
	began := time.Now()
	t.Cleanup(func() { t.Logf("took %v", time.Since(began).Round(10*time.Millisecond)) })
	return nodes[0]
}

// newWorld starts a key service.
func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{dir: t.TempDir(), log: &log{}}
	ca := must[*pki.Authority](t)(pki.NewAuthority())
	check(t, ca.Write(w.dir, must[tls.Certificate](t)(ca.Server("127.0.0.1"))))
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	_, w.port, _ = net.SplitHostPort(l.Addr().String())
	check(t, l.Close())
	w.maker = must[*swtpm.Authority](t)(swtpm.NewAuthority(w.mkdir(t, "maker")))
	w.write(t, "policy.yaml", fmt.Sprintf(policy, w.maker.IssuerPath()))
	w.write(t, "serve.yaml", fmt.Sprintf(`listen: 127.0.0.1:%s
tls: {certificate: server.pem, key: server.key}
policy: policy.yaml
kms: kms://cluster-kms?file=master.secret
storage: storage://file?dir=records
audit: audit.log
admin: %s/admin.sock
`, w.port, w.dir))
	t.Cleanup(func() { w.stop() })
	return w
}

func (w *world) mkdir(t testing.TB, name string) string {
	t.Helper()
	dir := filepath.Join(w.dir, name)
	check(t, os.MkdirAll(dir, 0o755))
	return dir
}

func (w *world) write(t testing.TB, name, text string) {
	t.Helper()
	check(t, os.WriteFile(filepath.Join(w.dir, name), []byte(text), 0o600))
}

// serve starts the key service. The makers of TPMs must have made one by then, so
// that their certificate exists.
func (w *world) serve(t testing.TB) {
	t.Helper()
	if w.process != nil {
		return
	}
	w.process = exec.Command(cmp.Or(w.program, program()), "serve", "--config", "serve.yaml", "--init-master-secret")
	w.process.Dir, w.process.Stderr = w.dir, w.log
	check(t, w.process.Start())
	eventually(t, "the key service listens", func() bool {
		if strings.Contains(w.log.String(), "hint:") {
			t.Fatal(w.log.String())
		}
		c, err := net.Dial("tcp", "127.0.0.1:"+w.port)
		if err != nil {
			return false
		}
		return c.Close() == nil
	})
}

func (w *world) stop() {
	if w.process != nil {
		_ = w.process.Process.Kill()
		_ = w.process.Wait()
		w.process = nil
	}
}

// eventually waits for something that happens soon.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// machine is a node: a TPM and what it keeps in memory.
type machine struct {
	*world
	name, dir string
	tpm       *swtpm.TPM
	eventLog  string // of the firmware; empty: none
	more      string // lines of the configuration
	callers   string // a rule beside that of root
	patient   bool   // with the program's own limits in place of short ones
	program   string // if it is another one
}

// short are limits that a test need not wait long for.
const short = `retry: {budget: 20s, first: 50ms, max: 500ms}
watch: 1s
device_timeout: 5s
`

func (w *world) node(t testing.TB, name string) *machine {
	t.Helper()
	m := &machine{world: w, name: name, dir: w.mkdir(t, name), tpm: swtpm.New(t, w.maker)}
	check(t, swtpm.Extend(m.tpm.Device, 4, make([]byte, 32)))
	w.serve(t)
	return m
}

// configure writes the node's configuration. Each volume is a line of YAML.
func (m *machine) configure(t testing.TB, volumes ...string) {
	t.Helper()
	limits := short
	if m.patient {
		limits = ""
	}
	callers := ""
	if m.callers != "" {
		callers = ", " + m.callers
	}
	text := fmt.Sprintf(`servers: [{address: "127.0.0.1:%s", ca: %s/ca.pem}]
tpm: {device: "%s", event_log: "%s"}
state_dir: %s/state
socket: %s/agent.sock
callers: [{uid: 0, operations: [open, format, close, status, list, resize, suspend, resume, rotate, retire, backup-header, restore-header], volumes: ["*"]}%s]
%s%s
volumes:
`, m.port, m.world.dir, m.tpm.Device, cmp.Or(m.eventLog, "/nonexistent"), m.dir, m.dir, callers, limits, m.more)
	if len(volumes) == 0 {
		text = strings.TrimSuffix(text, "volumes:\n")
	}
	for _, v := range volumes {
		text += "  - " + v + "\n"
	}
	check(t, os.WriteFile(filepath.Join(m.dir, "agent.yaml"), []byte(text), 0o600))
}

// command is keyagent on this node, without an agent.
func (m *machine) command(args ...string) *exec.Cmd {
	verbs := []string{"unlock", "format", "provision", "close", "status", "resize", "suspend", "resume", "rotate", "retire", "backup-header", "restore-header"}
	if slices.Contains(verbs, args[0]) {
		args = append([]string{args[0], "--config", filepath.Join(m.dir, "agent.yaml")}, args[1:]...)
	}
	cmd := exec.Command(cmp.Or(m.program, program()), args...)
	cmd.Dir = m.dir
	return cmd
}

// run returns what keyagent says, and its exit code.
func (m *machine) run(t testing.TB, args ...string) (string, int) {
	t.Helper()
	cmd := m.command(args...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func (m *machine) must(t testing.TB, args ...string) string {
	t.Helper()
	out, code := m.run(t, args...)
	if code != 0 {
		t.Fatalf("%s: keyagent %s: exit code %d\n%s\nthe service said:\n%s", m.name, strings.Join(args, " "), code, out, tail(m.log.String()))
	}
	return out
}

// fails wants an exit code and a word.
func (m *machine) fails(t testing.TB, code int, word string, args ...string) {
	t.Helper()
	out, got := m.run(t, args...)
	if got != code || !strings.Contains(out, word) {
		t.Errorf("%s: keyagent %s: exit code %d, want %d with %q\n%s", m.name, strings.Join(args, " "), got, code, word, out)
	}
}

func tail(s string) string { return s[max(0, len(s)-3000):] }

// agent is a running agent.
type agent struct {
	cmd *exec.Cmd
	log *log
	end chan error
}

// start starts the node's agent and waits until it serves.
func (m *machine) start(t testing.TB) *agent {
	t.Helper()
	a := &agent{cmd: exec.Command(cmp.Or(m.program, program()), "agent", "--config", "agent.yaml"), log: &log{}, end: make(chan error, 1)}
	a.cmd.Dir, a.cmd.Stderr = m.dir, a.log
	check(t, a.cmd.Start())
	go func() { a.end <- a.cmd.Wait() }()
	t.Cleanup(func() {
		a.kill()
		if t.Failed() {
			t.Logf("the agent said:\n%s\nthe service said:\n%s", tail(a.log.String()), tail(m.log.String()))
		}
	})
	return a
}

func (a *agent) waitFor(t testing.TB, word string) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !strings.Contains(a.log.String(), word) {
		if time.Now().After(deadline) {
			t.Fatalf("the agent never says %q:\n%s", word, tail(a.log.String()))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// terminate asks the agent to end, and demands that it does so without an error.
func (a *agent) terminate(t *testing.T) {
	t.Helper()
	check(t, a.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case err := <-a.end:
		a.end <- err
		if err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("SIGTERM is not heard")
	}
}

func (a *agent) kill() {
	_ = a.cmd.Process.Kill()
	select {
	case err := <-a.end:
		a.end <- err
	case <-time.After(20 * time.Second):
	}
}

// image makes a sparse file.
func image(t testing.TB, size int64) string {
	t.Helper()
	f := must[*os.File](t)(os.CreateTemp(t.TempDir(), "disk"))
	check(t, f.Truncate(size))
	check(t, f.Close())
	return f.Name()
}

// loop is a block device over an image.
func loop(t testing.TB, file string, flags ...string) string {
	t.Helper()
	device := tool(t, "losetup", append(append([]string{"-f", "--show"}, flags...), file)...)
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", device).Run() })
	return device
}

func disk(t testing.TB, size int64) string { return loop(t, image(t, size)) }

const (
	mib      = 1 << 20
	diskSize = 64 * mib
)

// mountPoint is a path that does not exist, whose mount ends with the test.
func mountPoint(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	t.Cleanup(func() { _ = exec.Command("umount", "-R", path).Run() })
	return path
}

// removed takes mappings away when the test ends, whatever became of it.
func removed(t testing.TB, names ...string) {
	t.Cleanup(func() {
		for _, n := range names {
			_ = exec.Command("dmsetup", "remove", "--retry", n).Run()
		}
	})
}

func put(t testing.TB, path, text string) {
	t.Helper()
	f := must[*os.File](t)(os.Create(path))
	_, err := f.WriteString(text)
	check(t, errors.Join(err, f.Sync(), f.Close()))
}

func holds(t testing.TB, path, want string) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || string(got) != want {
		t.Errorf("%s holds %.80q, %v; want %.80q", path, got, err, want)
	}
}

// mapped reports whether a mapping exists.
func mapped(name string) bool {
	return exec.Command("dmsetup", "info", name).Run() == nil
}

func mounted(path string) bool { return exec.Command("mountpoint", "-q", path).Run() == nil }

// overwrite changes bytes of a device, as the host would.
func overwrite(t testing.TB, device string, at int64, with []byte) {
	t.Helper()
	f := must[*os.File](t)(os.OpenFile(device, os.O_RDWR, 0))
	_, err := f.WriteAt(with, at)
	check(t, errors.Join(err, f.Sync(), f.Close()))
	tool(t, "sync")
	check(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
}

func peek(t testing.TB, device string, at int64, n int) []byte {
	t.Helper()
	f := must[*os.File](t)(os.Open(device))
	defer f.Close()
	b := make([]byte, n)
	_, err := io.ReadFull(io.NewSectionReader(f, at, int64(n)), b)
	check(t, err)
	return b
}
