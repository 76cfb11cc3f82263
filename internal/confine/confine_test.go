package confine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestMain lets this program be the process that confines itself, since what is taken
// does not come back.
func TestMain(m *testing.M) {
	if text, ok := os.LookupEnv("CONFINE_TEST"); ok {
		var o order
		if err := json.Unmarshal([]byte(text), &o); err != nil {
			panic(err)
		}
		o.obey()
		return
	}
	os.Exit(m.Run())
}

// order is what that process does.
type order struct {
	Below bool // a filter that takes seccomp(2) away
	Work  *Work
	Paths *Paths
	Try   []string // names of attempts
}

// obey prints what became of each attempt.
func (o order) obey() {
	before, stop := threads()
	defer stop()
	attempts["thread"] = before.read
	if o.Below {
		filter := []unix.SockFilter{
			{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offsetNumber},
			{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SECCOMP, Jf: 1},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		}
		runtime.LockOSThread()
		err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		if err == nil {
			err = call(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
				uintptr(unsafe.Pointer(&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})))
		}
		if err != nil {
			fmt.Println(err)
		}
	}
	if o.Work != nil {
		if ok, err := Syscalls(*o.Work); !ok || err != nil {
			fmt.Println("seccomp:", ok, err)
		}
	}
	if o.Paths != nil {
		if version, err := Files(*o.Paths); version == 0 || err != nil {
			fmt.Println("landlock:", version, err)
		}
	}
	for _, name := range o.Try {
		what, arg, _ := strings.Cut(name, " ")
		fmt.Printf("%s: %s\n", name, verdict(attempts[what](arg)))
	}
}

// early are threads that run before the process is confined, as those of a real one do.
// Each does what it is told.
type early []chan func()

func threads() (e early, stop func()) {
	var wait sync.WaitGroup
	for range 8 {
		todo := make(chan func())
		e = append(e, todo)
		wait.Go(func() {
			runtime.LockOSThread()
			for f := range todo {
				f()
			}
		})
		todo <- func() {}
	}
	return e, func() {
		for _, todo := range e {
			close(todo)
		}
		wait.Wait()
	}
}

// read is whether any of the threads can, since each may be the one that is broken into.
func (e early) read(path string) error {
	can := 0
	for _, todo := range e {
		done := make(chan error)
		todo <- func() { _, err := os.ReadFile(path); done <- err }
		if <-done == nil {
			can++
		}
	}
	if can > 0 {
		return fmt.Errorf("%d of %d threads can", can, len(e))
	}
	return unix.EACCES
}

func verdict(err error) string {
	var errno unix.Errno
	switch {
	case err == nil:
		return "done"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

func call(n uintptr, args ...uintptr) error {
	args = append(args, 0, 0, 0, 0, 0, 0)
	if _, _, errno := unix.Syscall6(n, args[0], args[1], args[2], args[3], args[4], args[5]); errno != 0 {
		return errno
	}
	return nil
}

const invalid = ^uintptr(0)

// attempts that need no privilege to be told apart: what a filter lets through fails on
// arguments that make no sense.
var attempts = map[string]func(arg string) error{
	"ptrace":            func(string) error { return call(unix.SYS_PTRACE, unix.PTRACE_CONT, uintptr(os.Getpid())) },
	"process_vm_readv":  func(string) error { return call(unix.SYS_PROCESS_VM_READV, uintptr(os.Getpid()), 0, 0, 0, 0, 1) },
	"kexec_load":        func(string) error { return call(unix.SYS_KEXEC_LOAD, 0, 0, 0, invalid) },
	"finit_module":      func(string) error { return call(unix.SYS_FINIT_MODULE, invalid, 0, 0) },
	"reboot":            func(string) error { return call(unix.SYS_REBOOT, 0, 0, 0) },
	"bpf":               func(string) error { return call(unix.SYS_BPF, invalid, 0, 0) },
	"perf_event_open":   func(string) error { return call(unix.SYS_PERF_EVENT_OPEN, 0, invalid) },
	"userfaultfd":       func(string) error { return call(unix.SYS_USERFAULTFD, invalid) },
	"open_by_handle_at": func(string) error { return call(unix.SYS_OPEN_BY_HANDLE_AT, invalid, 0, 0) },
	"personality":       func(string) error { return call(unix.SYS_PERSONALITY, 0xffffffff) },
	"clock_settime":     func(string) error { return call(unix.SYS_CLOCK_SETTIME, 99, 0) },
	"io_uring_setup":    func(string) error { return call(unix.SYS_IO_URING_SETUP, 1, 0) },
	"clone3":            func(string) error { return call(unix.SYS_CLONE3, 0, 0) },
	"unshare":           func(string) error { return call(unix.SYS_UNSHARE, 0) },
	"clone":             func(string) error { return call(unix.SYS_CLONE, unix.CLONE_NEWUSER|unix.CLONE_FS) }, // a contradiction
	"fsopen":            func(string) error { return call(unix.SYS_FSOPEN, 0, invalid) },
	"mount":             func(string) error { return unix.Mount("none", "/nonexistent", "tmpfs", 0, "") },
	"umount":            func(string) error { return unix.Unmount("/nonexistent", 0) },
	"swapon":            func(string) error { return call(unix.SYS_SWAPON, 0, 0) },
	"keyctl":            func(string) error { return call(unix.SYS_KEYCTL, unix.KEYCTL_DESCRIBE, 0x7ffffffe) },

	"read":   func(path string) error { _, err := os.ReadFile(path); return err },
	"list":   func(path string) error { _, err := os.ReadDir(path); return err },
	"write":  func(path string) error { return os.WriteFile(path, []byte("new"), 0o600) },
	"mkdir":  func(path string) error { return os.Mkdir(path, 0o700) },
	"remove": os.Remove,
	"replace": func(path string) error {
		return errors.Join(os.WriteFile(path+".new", []byte("new"), 0o600), os.Rename(path+".new", path))
	},
	"kill": func(string) error { return unix.Kill(os.Getppid(), 0) },
	"run":  func(text string) error { return exec.Command("/bin/sh", "-c", text).Run() },
	"status": func(want string) error {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, task := range tasks {
			text, err := os.ReadFile(filepath.Join("/proc/self/task", task.Name(), "status"))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			got := strings.Join(regexp.MustCompile(`(?m)^(?:NoNewPrivs|Seccomp):\s+\d`).FindAllString(string(text), -1), " ")
			if got = strings.Join(strings.Fields(got), ""); got != want {
				return fmt.Errorf("thread %s: %s", task.Name(), got)
			}
		}
		return nil
	},
}

// confined runs a process and returns what it says, a line for each attempt.
func confined(t *testing.T, o order) string {
	t.Helper()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "CONFINE_TEST="+string(text), "GORACE=atexit_sleep_ms=0")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s\n%s", err, errs.String(), out)
	}
	return string(out)
}

func works(w Work) *Work { return &w }

// A unit of the version before, or a container, may allow no filter of the process's own.
// It starts all the same, under theirs.
func TestAFilterBelowAnotherIsNoError(t *testing.T) {
	got := confined(t, order{Below: true, Work: works(Volumes), Try: []string{"ptrace"}})
	if want := "seccomp: false <nil>\nptrace: ESRCH\n"; got != want {
		t.Errorf("%q", got)
	}
}

// What no role needs is refused to each; what one of them needs is refused to the others.
func TestSystemCallsOfNoUseAreRefused(t *testing.T) {
	never := []string{
		"ptrace", "process_vm_readv", "kexec_load", "finit_module", "reboot", "bpf", "perf_event_open", "userfaultfd",
		"open_by_handle_at", "personality", "clock_settime",
	}
	for name, tt := range map[string]struct {
		work    Work
		refused []string
		absent  []string
		passed  map[string]string // what the kernel itself says
	}{
		"keys": {Keys, []string{"unshare", "clone", "fsopen", "mount", "umount", "swapon", "keyctl"}, []string{"clone3"}, nil},
		"volumes": {Volumes, []string{"unshare", "clone", "fsopen"}, []string{"clone3"},
			map[string]string{"mount": "ENOENT", "umount": "ENOENT", "swapon": "EFAULT", "keyctl": "ENOKEY"}},
		"commands": {Commands, []string{"swapon"}, nil,
			map[string]string{"unshare": "done", "clone": "EINVAL", "clone3": "EINVAL", "fsopen": "EINVAL", "mount": "ENOENT", "umount": "ENOENT", "keyctl": "ENOKEY"}},
	} {
		o := order{Work: works(tt.work), Try: []string{"status NoNewPrivs:1Seccomp:2", "run true", "io_uring_setup"}}
		want := "status NoNewPrivs:1Seccomp:2: done\nrun true: done\nio_uring_setup: ENOSYS\n"
		add := func(what, verdict string) { o.Try = append(o.Try, what); want += what + ": " + verdict + "\n" }
		for _, what := range append(never, tt.refused...) {
			add(what, "EPERM")
		}
		for _, what := range tt.absent {
			add(what, "ENOSYS")
		}
		for what, verdict := range tt.passed {
			if os.Geteuid() != 0 && verdict != "ENOKEY" {
				continue // the kernel refuses it itself
			}
			add(what, verdict)
		}
		if got := confined(t, o); got != want {
			t.Errorf("%s: got\n%s, want\n%s", name, got, want)
		}
	}
}

// The attempts tell the two apart: without a filter, none ends as one with it does.
func TestTheAttemptsSucceedWithoutAFilter(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("the kernel refuses most of them to users (hint: run the tests as root)")
	}
	var try []string
	for name := range attempts {
		switch name {
		case "read", "list", "write", "mkdir", "remove", "replace", "kill", "run", "status":
		default:
			try = append(try, name)
		}
	}
	for line := range strings.Lines(confined(t, order{Try: try})) {
		verdict := "EPERM"
		if strings.HasPrefix(line, "io_uring_setup") || strings.HasPrefix(line, "clone3") {
			verdict = "ENOSYS"
		}
		if strings.HasSuffix(line, ": "+verdict+"\n") {
			t.Errorf("without a filter: %s", line)
		}
	}
}

// tree makes the files of a role and of others, below one folder.
func tree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for path, text := range map[string]string{
		"conf/..one/serve.yaml": "a", "conf/policy.yaml": "b", "state/records/one": "c", "run/admin.sock": "d", "run/other": "e",
		"home/secret": "f", "certs/real/server.pem": "g",
	} {
		path = filepath.Join(dir, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	// As Kubernetes mounts a ConfigMap, and as a renewal program leaves certificates.
	for link, to := range map[string]string{"conf/serve.yaml": "..data/serve.yaml", "conf/..data": "..one", "certs/server.pem": "real/server.pem"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// needLandlock returns its version.
func needLandlock(t *testing.T) int {
	t.Helper()
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		t.Fatal("this kernel has no landlock (hint: Debian's have; is it in /sys/kernel/security/lsm?)")
	}
	return int(v)
}

// A role reads what it was told to, writes where its state is, and reaches nothing else.
func TestFilesOfOthersAreOutOfReach(t *testing.T) {
	needLandlock(t)
	dir := tree(t)
	in := func(path string) string { return filepath.Join(dir, path) }
	for _, path := range []string{"late/other", "roots/a/one.pem", "roots/b/one.pem"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(in(path)), 0o700), os.WriteFile(in(path), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("SSL_CERT_DIR", in("roots/a")+":"+in("roots/b"))
	p := Paths{
		Read:    []string{in("conf/serve.yaml"), in("certs/server.pem"), in("missing/later.pem"), in("late/token"), ""},
		Write:   []string{in("state/records")},
		Sockets: []string{in("run/admin.sock")},
	}
	for _, work := range []*Work{nil, works(Keys)} { // in whichever order, both are in force
		o, want := order{Work: work, Paths: &p}, ""
		for _, one := range []struct{ attempt, verdict string }{
			{"read " + in("conf/serve.yaml"), "done"},
			{"read " + in("conf/policy.yaml"), "done"}, // named at a reload
			{"read " + in("certs/server.pem"), "done"},
			{"read " + in("late/other"), "done"}, // where a token will be
			{"read " + in("roots/a/one.pem"), "done"},
			{"read " + in("roots/b/one.pem"), "done"},
			{"read /etc/passwd", "done"},
			{"list /proc/self/task", "done"},
			{"write " + in("conf/policy.yaml"), "EACCES"},
			{"read " + in("home/secret"), "EACCES"},
			{"thread " + in("home/secret"), "EACCES"},
			{"run cat " + in("home/secret"), "exit status 1"},
			{"run cat /etc/passwd", "done"},
			{"write " + in("home/new"), "EACCES"},
			{"list " + dir, "EACCES"},
			{"read " + in("state/records/one"), "done"},
			{"replace " + in("state/records/one"), "done"},
			{"mkdir " + in("state/records/folder"), "done"},
			{"write " + in("state/outside"), "EACCES"},
			{"remove " + in("run/admin.sock"), "done"},
			{"write " + in("run/new"), "EACCES"},
			{"write /dev/null", "done"},
			{"write /etc/keyagent-confine-test", "EACCES"},
		} {
			o.Try, want = append(o.Try, one.attempt), want+one.attempt+": "+one.verdict+"\n"
		}
		if work != nil {
			o.Try, want = append(o.Try, "mount"), want+"mount: EPERM\n"
		}
		if got := confined(t, o); got != want {
			t.Errorf("got\n%s, want\n%s", got, want)
		}
		if err := errors.Join(os.Remove(in("state/records/folder")), os.WriteFile(in("run/admin.sock"), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
}

// Where somebody else's library decides what is read, all may be read, and no more be
// written than otherwise.
func TestAnythingMayBeReadAndNotWritten(t *testing.T) {
	needLandlock(t)
	dir := tree(t)
	secret, write := filepath.Join(dir, "home/secret"), filepath.Join(dir, "home/new")
	got := confined(t, order{Paths: &Paths{Anything: true}, Try: []string{"read " + secret, "write " + write}})
	if want := "read " + secret + ": done\nwrite " + write + ": EACCES\n"; got != want {
		t.Errorf("got\n%s, want\n%s", got, want)
	}
}

// Nor does a role signal the processes of others. A kernel whose landlock is older than
// version 6 cannot tell, and lets it.
func TestOthersAreNotSignalled(t *testing.T) {
	v, verdict := needLandlock(t), "EPERM"
	if v < 6 {
		verdict = "done"
	}
	if got := confined(t, order{Paths: &Paths{}, Try: []string{"kill", "run kill -0 $$"}}); got != "kill: "+verdict+"\nrun kill -0 $$: done\n" {
		t.Errorf("landlock of version %d: %s", v, got)
	}
}

// Processes are confined while their threads come and go, and none of those is missed.
func TestNoThreadIsMissed(t *testing.T) {
	needLandlock(t)
	secret := filepath.Join(tree(t), "home/secret")
	for range 40 {
		got := confined(t, order{Work: works(Keys), Paths: &Paths{}, Try: []string{"thread " + secret, "status NoNewPrivs:1Seccomp:2"}})
		if want := "thread " + secret + ": EACCES\nstatus NoNewPrivs:1Seccomp:2: done\n"; got != want {
			t.Fatalf("got\n%s, want\n%s", got, want)
		}
	}
}
