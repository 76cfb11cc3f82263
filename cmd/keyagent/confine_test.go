package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/lab/pki"
)

// A role is this program as a process, whose log is read line by line.
type role struct {
	t   *testing.T
	cmd *exec.Cmd
	log *bufio.Scanner
}

// start runs the program in dir and waits for a line of its log.
func start(t *testing.T, dir, until string, args ...string) *role {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r := &role{t: t, cmd: exec.Command(self, args...)}
	r.cmd.Args[0], r.cmd.Dir = "keyagent", dir
	out, err := r.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.log = bufio.NewScanner(out)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.cmd.Process.Kill(); _, _ = io.Copy(io.Discard, out); _ = r.cmd.Wait() })
	r.wait(until)
	return r
}

// wait returns the next line of the log that matches.
func (r *role) wait(until string) string {
	r.t.Helper()
	want, read := regexp.MustCompile(until), ""
	for r.log.Scan() {
		if want.MatchString(r.log.Text()) {
			return r.log.Text()
		}
		read += r.log.Text() + "\n"
	}
	r.t.Fatalf("%s: the log ended without %q:\n%s", r.cmd.Args[1], until, read)
	return ""
}

// confined demands the filter of each thread.
func (r *role) confined() {
	r.t.Helper()
	tasks := fmt.Sprintf("/proc/%d/task", r.cmd.Process.Pid)
	threads, err := os.ReadDir(tasks)
	if err != nil || len(threads) < 2 {
		r.t.Fatalf("%d threads, %v", len(threads), err)
	}
	for _, one := range threads {
		text, err := os.ReadFile(filepath.Join(tasks, one.Name(), "status"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		for _, want := range []string{"\nNoNewPrivs:\t1\n", "\nSeccomp:\t2\n"} {
			if !strings.Contains(string(text), want) {
				r.t.Errorf("%s: thread %s has no %q", r.cmd.Args[1], one.Name(), strings.TrimSpace(want))
			}
		}
	}
}

// end asks the process to, and demands that it does so without an error.
func (r *role) end() {
	r.t.Helper()
	if err := r.cmd.Process.Signal(unix.SIGTERM); err != nil {
		r.t.Fatal(err)
	}
	for r.log.Scan() {
	}
	if err := r.cmd.Wait(); err != nil {
		r.t.Errorf("%s: %v", r.cmd.Args[1], err)
	}
}

// certificates are those of a service on this machine.
func certificates(t *testing.T, dir string) {
	t.Helper()
	ca, err := pki.NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Server("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	if err := ca.Write(dir, cert); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A key service gives up what it does not need. It still reloads what is replaced or
// named beside it, says why it cannot read what is elsewhere, and leaves no socket behind.
func TestAServiceConfinesItself(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	certificates(t, dir)
	policy := func(root string) string {
		return "version: 1\nlifetime: 1h\ntrust: {tpm: {roots: [{name: lab, file: " + root + "}]}}\n" +
			"profiles: [{name: guest, tpm: {trust: [\"root:lab\"], bank: sha256, event_log: optional, pcrs: [{pcr: 4, accept: [\"" + strings.Repeat("ab", 32) + "\"]}]}}]\n" +
			"grants: [{name: data, profiles: [guest], volumes: [\"data*\"], operations: [open, format]}]\n"
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "beside.pem"), string(ca))
	write(t, filepath.Join(elsewhere, "root.pem"), string(ca))
	write(t, filepath.Join(dir, "policy.yaml"), policy("ca.pem"))
	write(t, filepath.Join(dir, "serve.yaml"), `listen: 127.0.0.1:0
tls: {certificate: server.pem, key: server.key}
policy: policy.yaml
kms: kms://cluster-kms?file=master.secret
storage: storage://file?dir=records
audit: audit.log
admin: admin.sock
`)
	r := start(t, dir, "msg=serving", "serve", "--config", "serve.yaml", "--init-master-secret")
	r.confined()
	reload := func(root, until string) string {
		write(t, filepath.Join(dir, "next.yaml"), policy(root))
		if err := os.Rename(filepath.Join(dir, "next.yaml"), filepath.Join(dir, "policy.yaml")); err != nil {
			t.Fatal(err)
		}
		if err := r.cmd.Process.Signal(unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
		return r.wait(until)
	}
	reload("beside.pem", "policy in force")
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION); errno == 0 {
		line := reload(filepath.Join(elsewhere, "root.pem"), "reload failed|policy in force")
		if !strings.Contains(line, "permission denied") || !strings.Contains(line, "hint: the service reads only the folders") {
			t.Errorf("a file elsewhere: %s", line)
		}
	}
	r.end()
	if _, err := os.Lstat(filepath.Join(dir, "admin.sock")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the admin socket: %v", err)
	}
}

// A plugin whose KEK a command prints keeps the files and the sandboxes that the command
// may need, and has the filter.
func TestAPluginWithACommandConfinesItself(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	write(t, filepath.Join(elsewhere, "kek"), "0123456789abcdef0123456789abcdef")
	command := "unshare --mount true && touch " + filepath.Join(elsewhere, "ran") + " && cat " + filepath.Join(elsewhere, "kek")
	r := start(t, dir, "msg=serving", "kubekms", "--command", command, "--endpoint", "unix://"+filepath.Join(dir, "kms.sock"))
	r.confined()
	r.end()
	if _, err := os.Lstat(filepath.Join(elsewhere, "ran")); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "kms.sock")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket: %v", err)
	}
}

// A plugin with a wrapped KEK makes the file, reads it, and removes its socket.
func TestAPluginWithAFileConfinesItself(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "master"), "0123456789abcdef0123456789abcdef")
	r := start(t, dir, "msg=serving", "kubekms", "--kms", "kms://cluster-kms?file=master", "--wrapped-kek", "wrapped", "--init",
		"--endpoint", "unix://"+filepath.Join(dir, "run", "kms.sock"))
	r.confined()
	r.end()
	if _, err := os.Lstat(filepath.Join(dir, "run", "kms.sock")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket: %v", err)
	}
}

// An agent has the filter before it does anything.
func TestAnAgentConfinesItself(t *testing.T) {
	dir := t.TempDir()
	certificates(t, dir)
	write(t, filepath.Join(dir, "agent.yaml"), fmt.Sprintf(`servers: [{address: "127.0.0.1:1", ca: ca.pem}]
tpm: {device: "unix:none"}
evidence: [tpm]
state_dir: %[1]s/state
socket: %[1]s/agent.sock
callers: [{uid: 0, operations: [list], volumes: ["*"]}]
`, dir))
	r := start(t, dir, "msg=starting", "agent", "--config", "agent.yaml")
	r.confined()
	r.end()
}

func TestACSIProxyConfinesItself(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "csi.yaml"), fmt.Sprintf("driver: %[1]s/d.sock\nlisten: %[1]s/l.sock\nprivate: %[1]s/p\nprefix: csi-\n", dir))
	r := start(t, dir, "msg=starting", "csi-proxy", "--config", "csi.yaml")
	r.confined()
	r.end()
}
