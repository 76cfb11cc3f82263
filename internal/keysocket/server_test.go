package keysocket

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// This program is the caller, too: KEYSOCKET_CALL is the name that it binds, and the
// socket that it calls.
func TestMain(m *testing.M) {
	if text := os.Getenv("KEYSOCKET_CALL"); text != "" {
		name, path, _ := strings.Cut(text, " ")
		if err := call(name, path, os.Getenv("KEYSOCKET_SHARE") != ""); err != nil {
			fmt.Println("ERROR", err)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// call reads what the socket gives to a caller of that name. It waits for a line on its
// input first, so that it can be put in its place.
func call(name, path string, share bool) error {
	_, _ = os.Stdin.Read(make([]byte, 1))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if name != "" {
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: "@" + strings.ReplaceAll(name, "NUL", "\x00")}); err != nil {
			return err
		}
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return err
	}
	if share { // a child goes on with the socket, and this process has it no more
		socket := os.NewFile(uintptr(fd), "socket")
		child := exec.Command("cat")
		child.Stdin, child.Stdout = socket, os.Stdout
		if err := errors.Join(child.Start(), socket.Close()); err != nil {
			return err
		}
		fmt.Println("SHARED")
		return child.Wait()
	}
	f := os.NewFile(uintptr(fd), "socket")
	got, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	fmt.Printf("GOT %q\n", got)
	return nil
}

// volumes hand out a key that says whose it is.
type volumes struct {
	mu    sync.Mutex
	asked []string
	block chan struct{} // HandOut waits for it, or for ctx
	left  chan struct{} // is closed when ctx ended first
}

func (v *volumes) HandOut(ctx context.Context, volume string, give func([]byte) error, gone <-chan struct{}) error {
	v.mu.Lock()
	v.asked = append(v.asked, volume)
	block := v.block
	v.mu.Unlock()
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
			close(v.left)
			return ctx.Err()
		}
	}
	if err := give([]byte("key of " + volume + "\x00\n")); err != nil {
		return err
	}
	if gone != nil {
		select {
		case <-gone:
		case <-ctx.Done():
		}
	}
	return nil
}

type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// bed is a server, and a place for its callers among the control groups.
type bed struct {
	path    string
	groups  string
	volumes *volumes
	log     *logged
}

func newBed(t *testing.T) *bed {
	t.Helper()
	b, serve := laterBed(t)
	serve()
	return b
}

// laterBed is a bed whose callers wait until it serves.
func laterBed(t *testing.T) (b *bed, serve func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "k")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	b = &bed{path: filepath.Join(dir, "s"), groups: unified(t), volumes: &volumes{left: make(chan struct{}, 1)}, log: &logged{}}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: b.path, Net: "unix"})
	must(t, err)
	must(t, os.Chmod(b.path, 0o666)) // so that the kernel does not refuse for us
	s := &Server{Volumes: b.volumes, Log: slog.New(slog.NewTextHandler(b.log, nil)), Rules: []Rule{
		{Volume: "v1", Unit: "systemd-cryptsetup@data.service", Mapping: "data"},
		{Volume: "v2", Unit: "vault.service", Credential: "key"},
	}}
	return b, func() {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Serve(ctx, []*net.UnixListener{l}) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

// unified is where the kernel's control groups of version 2 are.
func unified(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); slices.Contains(fields, "cgroup2") && fields[3] == "/" {
			return fields[4]
		}
	}
	t.Fatal("no cgroup2 is mounted (hint: the tests run as root, see the README)")
	return ""
}

// in makes a control group and returns what puts a process in it.
func (b *bed) in(t *testing.T, group string) func(pid int) {
	t.Helper()
	dir := filepath.Join(b.groups, group)
	must(t, os.MkdirAll(dir, 0o755))
	t.Cleanup(func() {
		for d := dir; d != b.groups; d = filepath.Dir(d) {
			_ = os.Remove(d)
		}
	})
	return func(pid int) {
		must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Appendf(nil, "%d", pid), 0o644))
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// start starts a caller in a control group, by way of a program that changes what it is.
func (b *bed) start(t *testing.T, group, name string, by ...string) (cmd *exec.Cmd, out *logged) {
	t.Helper()
	place := b.in(t, group)
	self, err := os.Executable()
	must(t, err)
	cmd = exec.Command("/bin/sh", append([]string{"-c", `read line; exec "$@"`, "sh"}, append(by, self)...)...)
	cmd.Env = append(os.Environ(), "KEYSOCKET_CALL="+name+" "+b.path)
	out = &logged{}
	cmd.Stdout, cmd.Stderr = out, out
	in, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	place(cmd.Process.Pid)
	_, err = io.WriteString(in, "\n\n\n")
	must(t, err)
	must(t, in.Close())
	return cmd, out
}

func (b *bed) call(t *testing.T, group, name string, by ...string) string {
	t.Helper()
	cmd, out := b.start(t, group, name, by...)
	_ = cmd.Wait()
	return out.String()
}

const (
	cryptsetupGroup = `system.slice/system-systemd\x2dcryptsetup.slice/systemd-cryptsetup@data.service`
	vaultGroup      = "system.slice/vault.service"
	nothing         = "GOT \"\"\n"
)

func TestAUnitThatIsNamedGetsItsKeyVerbatim(t *testing.T) {
	b := newBed(t)
	for _, tt := range []struct{ group, name, want string }{
		{cryptsetupGroup, "d7067f78d9827418/cryptsetup/data", `GOT "key of v1\x00\n"`},
		{vaultGroup, "1/unit/vault.service/key", `GOT "key of v2\x00\n"`},
	} {
		if got := b.call(t, tt.group, tt.name); got != tt.want+"\n" {
			t.Errorf("%s as %s: %s\n%s", tt.group, tt.name, got, b.log)
		}
	}
	// systemd makes a mount namespace before it reads a credential.
	if got := b.call(t, vaultGroup, "2/unit/vault.service/key", "unshare", "--mount"); got != `GOT "key of v2\x00\n"`+"\n" {
		t.Errorf("%s\n%s", got, b.log)
	}
}

// A caller that forges the name, or is not quite the unit, gets nothing.
func TestAForgedCallerGetsNothing(t *testing.T) {
	b := newBed(t)
	for what, tt := range map[string]struct {
		group, name, why string
		by               []string
	}{
		"another unit":                      {"system.slice/other.service", "1/cryptsetup/data", "no rule", nil},
		"another unit's credential":         {"system.slice/other.service", "1/unit/vault.service/key", "no rule", nil},
		"a unit with the other's name":      {vaultGroup, "1/cryptsetup/data", "no rule", nil},
		"the other way round":               {cryptsetupGroup, "1/unit/vault.service/key", "no rule", nil},
		"a credential that no rule names":   {vaultGroup, "1/unit/vault.service/other", "no rule", nil},
		"a mapping that no rule names":      {cryptsetupGroup, "1/cryptsetup/other", "no rule", nil},
		"no unit":                           {"elsewhere", "1/cryptsetup/data", "no unit", nil},
		"below the unit":                    {vaultGroup + "/sub", "1/unit/vault.service/key", "no unit", nil},
		"a container's unit":                {"system.slice/docker-1.scope/" + vaultGroup, "1/unit/vault.service/key", "no unit", nil},
		"another user":                      {cryptsetupGroup, "1/cryptsetup/data", "not root", []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}},
		"root of a user namespace":          {cryptsetupGroup, "1/cryptsetup/data", "namespace: user", []string{"unshare", "--user", "--map-root-user"}},
		"root of a pid namespace":           {cryptsetupGroup, "1/cryptsetup/data", "namespace: pid", []string{"unshare", "--pid", "--fork"}},
		"root of a mount namespace":         {cryptsetupGroup, "1/cryptsetup/data", "namespace: mnt", []string{"unshare", "--mount"}},
		"a user namespace for a credential": {vaultGroup, "1/unit/vault.service/key", "namespace: user", []string{"unshare", "--user", "--map-root-user"}},
		"a name with more behind a zero":    {cryptsetupGroup, "1/cryptsetup/dataNULx", "asks for no key", nil},
		"tpm2":                              {cryptsetupGroup, "1/cryptsetup-tpm2/data", "asks for no key", nil},
		"fido2":                             {cryptsetupGroup, "1/cryptsetup-fido2/data", "asks for no key", nil},
		"no name":                           {cryptsetupGroup, "", "asks for no key", nil},
	} {
		t.Run(what, func(t *testing.T) {
			before := len(b.log.String())
			got := b.call(t, tt.group, tt.name, tt.by...)
			said := b.log.String()[before:]
			if got != nothing || !strings.Contains(said, tt.why) {
				t.Errorf("%s\n%s", got, said)
			}
		})
	}
	if len(b.volumes.asked) > 0 {
		t.Errorf("keys were asked for: %q", b.volumes.asked)
	}
}

// The kernel names the process that connected. It may not be the one that reads: here it
// is the unit that policy names, and has the socket no more.
func TestAChildThatInheritedTheSocketGetsNothing(t *testing.T) {
	b, serve := laterBed(t)
	t.Setenv("KEYSOCKET_SHARE", "1")
	cmd, out := b.start(t, cryptsetupGroup, "1/cryptsetup/data")
	deadline := time.Now().Add(30 * time.Second)
	for !strings.Contains(out.String(), "SHARED") {
		if time.Now().After(deadline) {
			t.Fatalf("never connected: %s", out)
		}
		time.Sleep(10 * time.Millisecond)
	}
	serve()
	_ = cmd.Wait()
	if got := out.String(); got != "SHARED\n" || !strings.Contains(b.log.String(), "does not hold the socket") {
		t.Errorf("the child got %q\n%s", got, b.log)
	}
}

// A process holds the socket that calls, or it only has the number of one that did.
func TestTheCallerHoldsItsSocket(t *testing.T) {
	for name, tt := range map[string]struct {
		bound, claimed string
		want           error
	}{
		"its own":         {"ab12/cryptsetup/data", "ab12/cryptsetup/data", nil},
		"another's":       {"ab13/cryptsetup/data", "ab14/cryptsetup/data", errNotHolder},
		"a longer one":    {"ab15/cryptsetup/datax", "ab15/cryptsetup/data", errNotHolder},
		"a shorter one":   {"ab16/cryptsetup/dat", "ab16/cryptsetup/data", errNotHolder},
		"behind a space":  {"x ab17/cryptsetup/data", "ab17/cryptsetup/data", errNotHolder},
		"behind newlines": {"x\n0 1 2 3 4 5 6 @ab18/cryptsetup/data", "ab18/cryptsetup/data", errNotHolder},
	} {
		t.Run(name, func(t *testing.T) {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			must(t, err)
			defer unix.Close(fd)
			must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: "@" + tt.bound}))
			p := &caller{pid: int32(os.Getpid()), raw: []byte("\x00" + tt.claimed)}
			if err := p.holdsSocket(); !errors.Is(err, tt.want) {
				t.Errorf("%v", err)
			}
		})
	}
	// Somebody else makes the kernel's list say the same name again.
	own, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(own)
	must(t, unix.Bind(own, &unix.SockaddrUnix{Name: "@ab20/cryptsetup/data"}))
	var st unix.Stat_t
	must(t, unix.Fstat(own, &st))
	twice := &caller{pid: int32(os.Getpid()), raw: []byte("\x00ab20/cryptsetup/data")}
	must(t, twice.holdsSocket())
	forged, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(forged)
	must(t, unix.Bind(forged, &unix.SockaddrUnix{Name: fmt.Sprintf("@x\n0 1 2 3 4 5 %d @ab20/cryptsetup/data", st.Ino)}))
	if err := twice.holdsSocket(); !errors.Is(err, errNotHolder) {
		t.Errorf("a name that stands there twice: %v", err)
	}
	// Another process than the one that bound it.
	other := exec.Command("sleep", "60")
	must(t, other.Start())
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: "@ab19/cryptsetup/data"}))
	p := &caller{pid: int32(other.Process.Pid), raw: []byte("\x00ab19/cryptsetup/data")}
	if err := p.holdsSocket(); !errors.Is(err, errNotHolder) {
		t.Errorf("%v", err)
	}
}

// A caller that goes away while the key service is asked ends the asking.
func TestACallerThatLeavesEndsTheAsking(t *testing.T) {
	b := newBed(t)
	b.volumes.block = make(chan struct{}) // for ever
	b.volumes.left = make(chan struct{})
	cmd, _ := b.start(t, cryptsetupGroup, "1/cryptsetup/data")
	deadline := time.Now().Add(30 * time.Second)
	for !strings.Contains(b.log.String(), "asks for a key") {
		if time.Now().After(deadline) {
			t.Fatalf("never asked: %s", b.log)
		}
		time.Sleep(10 * time.Millisecond)
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	select {
	case <-b.volumes.left:
	case <-time.After(30 * time.Second):
		t.Error("it is asked for still")
	}
}

func TestRefusalsHaveARate(t *testing.T) {
	var l lines
	now := time.Unix(1000, 0)
	said := 0
	for range 1000 {
		if _, ok := l.allow(now); ok {
			said++
		}
	}
	if said != linesBurst {
		t.Errorf("%d lines of 1000 at once", said)
	}
	now = now.Add(linesEvery)
	if withheld, ok := l.allow(now); !ok || withheld != 1000-linesBurst {
		t.Errorf("%d, %v", withheld, ok)
	}
	if _, ok := l.allow(now); ok {
		t.Error("more than the rate")
	}
	now = now.Add(time.Hour)
	for range linesBurst {
		if withheld, ok := l.allow(now); !ok || withheld > 1 {
			t.Fatalf("%d, %v", withheld, ok)
		}
	}
	if _, ok := l.allow(now); ok {
		t.Error("more than a burst")
	}
}
