package unixsocket

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestAControlGroupIsAPlainPath(t *testing.T) {
	const pod = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0a1b.slice/cri-containerd-77.scope"
	for name, tt := range map[string]struct{ text, want string }{
		"version 2":                        {"0::" + pod + "\n", pod},
		"the root":                         {"0::/\n", "/"},
		"beside version 1":                 {"12:pids:/user.slice\n1:name=systemd:/x\n0::/system.slice/a.service\n", "/system.slice/a.service"},
		"a colon in a name":                {"0::/a:b\n", "/a:b"},
		"version 1 alone":                  {"12:pids:/kubepods\n", ""},
		"a group that is gone":             {"0::" + pod + " (deleted)\n", ""},
		"above what this process sees":     {"0::/../kubepods.slice\n", ""},
		"the parent":                       {"0::/..\n", ""},
		"dots inside":                      {"0::/a/../kubepods.slice\n", ""},
		"a slash behind":                   {"0::/kubepods.slice/\n", ""},
		"not absolute":                     {"0::kubepods.slice\n", ""},
		"no path":                          {"0::\n", ""},
		"two lines":                        {"0::/a\n0::/b\n", ""},
		"a line's end in a name (case 31)": {"0::/a\n\n0::/b\n", ""},
		"a zero in a name":                 {"0::/a\x00b\n", ""},
		"a look-alike":                     {"0::/kubepоds.slice\n", ""},
		"cut off":                          {"0::/kubepods", ""},
		"nothing":                          {"", ""},
		"a long path":                      {"0::/" + strings.Repeat("a", maxCgroupPath) + "\n", ""},
		"a long file":                      {strings.Repeat("1:a:/\n", maxCgroupFile) + "0::/a\n", ""},
	} {
		got, err := parseCgroup(tt.text)
		if got != tt.want || (err == nil) != (tt.want != "") || err != nil && !errors.Is(err, ErrCgroup) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if err != nil && len(err.Error()) > 1000 {
			t.Errorf("%s: the error has %d bytes", name, len(err.Error()))
		}
	}
}

func FuzzControlGroup(f *testing.F) {
	f.Add("0::/kubepods.slice/pod1\n")
	f.Add("12:pids:/x\n0::/\n")
	f.Add("0::/a (deleted)\n")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := parseCgroup(text)
		if err != nil {
			return
		}
		if !plainCgroup(p) || strings.Count("\n"+text, "\n0::") != 1 || !strings.Contains("\n"+text, "\n0::"+p+"\n") {
			t.Errorf("%q of %q", p, text)
		}
	})
}

// dialled is a connection of this process to itself.
func dialled(t *testing.T) (near, far *net.UnixConn) {
	t.Helper()
	path := filepath.Join(folder(t), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if near, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"}); err != nil {
		t.Fatal(err)
	}
	if far, err = l.AcceptUnix(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

func TestACallerHasTheGroupThatTheKernelShows(t *testing.T) {
	_, far := dialled(t)
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	want, err := parseCgroup(string(text))
	if err != nil {
		t.Fatalf("this machine has no unified control groups: %v", err)
	}
	if got, err := cgroupOf(far, int32(os.Getpid())); err != nil || got != want {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
	if _, err := cgroupOf(far, 0); !errors.Is(err, ErrCgroup) {
		t.Errorf("a caller without a number: %v", err)
	}
}

// TestACallerThatEndedHasNoGroup: the process that connected left the connection to
// another one, whose group is not its own.
func TestACallerThatEndedHasNoGroup(t *testing.T) {
	if path := os.Getenv("DIAL"); path != "" {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		f, err := c.File()
		if err != nil {
			t.Fatal(err)
		}
		child := exec.Command("sleep", "60")
		child.ExtraFiles = []*os.File{f}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		fmt.Println("CHILD", child.Process.Pid)
		os.Exit(0)
	}
	path := filepath.Join(folder(t), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^TestACallerThatEndedHasNoGroup$")
	cmd.Env = append(os.Environ(), "DIAL="+path)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var child int
	if _, err := fmt.Sscanf(string(out), "CHILD %d", &child); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if p, err := os.FindProcess(child); err == nil {
		t.Cleanup(func() { _ = p.Kill() })
	}
	c, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cred, err := credOf(c)
	if err != nil {
		t.Fatal(err)
	}
	if int(cred.Pid) != cmd.Process.Pid {
		t.Fatalf("the kernel names %d, it was %d that connected", cred.Pid, cmd.Process.Pid)
	}
	if got, err := cgroupOf(c, cred.Pid); !errors.Is(err, ErrCgroup) {
		t.Errorf("%q, %v", got, err)
	}
	// Where its number was given to another process meanwhile, that one does not speak
	// for it: the descriptor is the connection's.
	if got, err := cgroupOf(c, int32(os.Getpid())); !errors.Is(err, ErrCgroup) {
		t.Errorf("by another number: %q, %v", got, err)
	}
}
