package unixsocket

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/keyagent/keyagent/internal/failure"
)

func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sock") // t.TempDir() may be longer than a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// stale leaves a socket that nobody listens on, as a killed process does.
func stale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

// TestARestartOverAStaleSocket is of cases 33 and 44.
func TestARestartOverAStaleSocket(t *testing.T) {
	path := filepath.Join(folder(t), "s")
	stale(t, path)
	l, err := Listen(path, Options{Mode: 0o640, UID: -1, GID: -1})
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Lstat(path); err != nil || st.Mode() != fs.ModeSocket|0o640 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if _, err := Listen(path, Options{UID: -1, GID: -1}); failure.Of(err).Class != failure.Configuration || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("a live socket: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after the end: %v", err)
	}
}

func TestAForeignSocketIsLeftAlone(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("only root can give a socket away (hint: the tests run as root, see the README)")
	}
	path := filepath.Join(folder(t), "s")
	stale(t, path)
	if err := os.Lchown(path, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, Options{UID: -1, GID: -1}); err == nil || !strings.Contains(err.Error(), "uid 65534") {
		t.Errorf("%v", err)
	}
	// It is not foreign if it is whom the socket is for.
	l, err := Listen(path, Options{UID: 65534, GID: 65534})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	st, err := os.Lstat(path)
	if err != nil || st.Sys().(*syscall.Stat_t).Uid != 65534 || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
}

func TestALongPathIsNamed(t *testing.T) {
	if _, err := Listen("/tmp/"+strings.Repeat("x", 200), Options{}); failure.Of(err).Class != failure.Configuration || !strings.Contains(err.Error(), "205 bytes") {
		t.Errorf("%v", err)
	}
}

// TestWhatSystemdHandsOver runs this program as a unit, with what is below as the
// inherited descriptor.
func TestWhatSystemdHandsOver(t *testing.T) {
	if os.Getenv("INHERIT") != "" {
		l, err := Inherited()
		if err != nil {
			os.Stdout.WriteString("ERROR " + err.Error())
			return
		}
		// The descriptor that was handed over is not for children, nor its variables.
		out, err := exec.Command("/bin/sh", "-c", "[ ! -e /proc/$$/fd/3 ] && echo CLOSED; echo LISTEN=$LISTEN_PID$LISTEN_FDS").CombinedOutput()
		os.Stdout.WriteString("OK " + l.Addr().String() + " " + strings.ReplaceAll(string(out), "\n", " "))
		if err != nil {
			os.Stdout.WriteString(err.Error())
		}
		return
	}
	dir := folder(t)
	file := func(f *os.File, err error) *os.File {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	unixListener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "good"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unixListener.Close() })
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tcp.Close() })
	datagram, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "dgram"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { datagram.Close() })
	client, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(dir, "good"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		fd   *os.File
		env  string // before exec, so that LISTEN_PID is the program's
		want string
	}{
		"a listening socket":     {file(unixListener.File()), "LISTEN_FDS=1 LISTEN_PID=$$", "OK " + filepath.Join(dir, "good")},
		"for another process":    {file(unixListener.File()), "LISTEN_FDS=1 LISTEN_PID=1", "is for process"},
		"two sockets":            {file(unixListener.File()), "LISTEN_FDS=2 LISTEN_PID=$$", "exactly one is expected"},
		"nothing":                {file(unixListener.File()), "", "handed over no socket"},
		"a socket of TCP":        {file(tcp.(*net.TCPListener).File()), "LISTEN_FDS=1 LISTEN_PID=$$", "not a unix socket"},
		"datagrams":              {file(datagram.File()), "LISTEN_FDS=1 LISTEN_PID=$$", "not a stream socket"},
		"a connection":           {file(client.File()), "LISTEN_FDS=1 LISTEN_PID=$$", "does not listen"},
		"a file":                 {file(os.Open(os.DevNull)), "LISTEN_FDS=1 LISTEN_PID=$$", "not a socket"},
		"numbers that are words": {file(unixListener.File()), "LISTEN_FDS=one LISTEN_PID=$$", "exactly one is expected"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(context.Background(), "/bin/sh", "-c", "export INHERIT=1 "+tt.env+`; exec "$0" -test.run='^TestWhatSystemdHandsOver$'`, self)
			cmd.ExtraFiles = []*os.File{tt.fd}
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), tt.want) {
				t.Fatalf("%v: %s", err, out)
			}
			if strings.HasPrefix(tt.want, "OK") && !strings.Contains(string(out), " CLOSED LISTEN= ") {
				t.Errorf("a child inherits: %s", out)
			}
		})
	}
}

// TestAllThatSystemdHandsOver is the same for a unit with several sockets, or none.
func TestAllThatSystemdHandsOver(t *testing.T) {
	if os.Getenv("INHERIT") != "" {
		all, err := InheritedAll()
		if err != nil {
			os.Stdout.WriteString("ERROR " + err.Error())
			return
		}
		os.Stdout.WriteString("OK")
		for _, l := range all {
			os.Stdout.WriteString(" " + filepath.Base(l.Addr().String()))
		}
		os.Stdout.WriteString("; LISTEN_FDS=" + os.Getenv("LISTEN_FDS"))
		return
	}
	dir := folder(t)
	var files []*os.File
	for _, name := range []string{"one", "two"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		f, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		files = append(files, f)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { null.Close() })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		files []*os.File
		env   string
		want  string
	}{
		"two sockets":         {files, "LISTEN_FDS=2 LISTEN_PID=$$ LISTEN_FDNAMES=a:b", "OK one two; LISTEN_FDS=\n"},
		"nothing":             {nil, "", "OK; LISTEN_FDS=\n"},
		"none":                {nil, "LISTEN_FDS=0 LISTEN_PID=$$", "OK; LISTEN_FDS=\n"},
		"for another process": {files, "LISTEN_FDS=2 LISTEN_PID=1", "OK; LISTEN_FDS=\n"},
		"a file among them":   {append(files[:1:1], null), "LISTEN_FDS=2 LISTEN_PID=$$", "ERROR what systemd handed over is not a socket"},
		"more than there are": {files, "LISTEN_FDS=3 LISTEN_PID=$$", "ERROR what systemd handed over is not a socket"},
		"too many":            {files, "LISTEN_FDS=257 LISTEN_PID=$$", "at most 256"},
		"a word":              {files, "LISTEN_FDS=two LISTEN_PID=$$", "at most 256"},
		"less than none":      {files, "LISTEN_FDS=-1 LISTEN_PID=$$", "at most 256"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("/bin/sh", "-c", "export INHERIT=1 "+tt.env+`; exec "$0" -test.run='^TestAllThatSystemdHandsOver$'`, self)
			cmd.ExtraFiles = tt.files
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(strings.ReplaceAll(string(out), "PASS", "\n"), tt.want) {
				t.Errorf("%v: %q", err, out)
			}
		})
	}
}
