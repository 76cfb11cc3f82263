// Package unixsocket is how this program's local services listen: on a path, on an
// abstract name, or on the socket that systemd hands over. Who calls is the kernel's
// word, see [Credentials].
package unixsocket

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
)

// maxPath is what the kernel allows for a name, with its terminating zero.
const maxPath = 107

// Options say who may reach a socket in the file system. Abstract names have no
// owner and no mode.
type Options struct {
	Mode fs.FileMode // of the socket; zero means 0600
	// UID and GID are the owner; -1 leaves that of this process.
	UID, GID int
}

// Listen makes the socket at path. A stale one of this user, which nobody listens
// on, is taken over; whatever else stands at the path is left alone and refused.
func Listen(path string, opts Options) (*net.UnixListener, error) {
	if len(path) > maxPath {
		return nil, failure.Newf(failure.Configuration, "choose a shorter path", "the socket's path has %d bytes, the kernel allows %d", len(path), maxPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := removeStale(path, opts); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	mode := opts.Mode
	if mode == 0 {
		mode = 0o600
	}
	if err := errors.Join(os.Lchown(path, opts.UID, opts.GID), os.Chmod(path, mode)); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func removeStale(path string, opts Options) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != fs.ModeSocket:
		return failure.Newf(failure.Configuration, "choose another socket, or remove what is there", "%s exists and is not a socket", path)
	}
	if owner := int(st.Sys().(*syscall.Stat_t).Uid); owner != os.Geteuid() && owner != opts.UID {
		return failure.Newf(failure.Configuration, "choose another socket, or remove what is there", "%s is a socket of uid %d", path, owner)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = c.Close()
		return failure.Newf(failure.Configuration, "stop the other process, or choose another socket", "another process listens on %s", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("socket %s: %w", path, err)
	}
	return os.Remove(path)
}

// ListenAbstract listens on a name without a file. It belongs to the network
// namespace: every process in it may take the name first, or call.
func ListenAbstract(name string) (*net.UnixListener, error) {
	if name == "" || len(name)+1 > maxPath || strings.ContainsRune(name, 0) {
		return nil, failure.Newf(failure.Configuration, "", "the name of an abstract socket has 1 to %d bytes", maxPath-1)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: "@" + name, Net: "unix"})
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, failure.Newf(failure.Configuration, "stop the other process, or choose another name", "another process has the abstract socket %q", name)
	}
	return l, err
}

// firstInherited is where systemd's sockets begin, see sd_listen_fds(3).
const firstInherited = 3

// Inherited returns the socket that systemd hands over: exactly one, a unix stream
// socket that listens. The variables that announced it are removed, so that no
// child takes it for its own.
func Inherited() (*net.UnixListener, error) {
	pid, n := announced()
	switch {
	case pid == "" || n == "":
		return nil, failure.Newf(failure.Configuration, "--endpoint unix:///PATH, or start this from a socket unit", "no endpoint is named, and systemd handed over no socket")
	case pid != fmt.Sprint(os.Getpid()):
		return nil, failure.Newf(failure.Configuration, "--endpoint unix:///PATH, or start this from a socket unit", "the socket that systemd handed over is for process %.16q, this is %d", pid, os.Getpid())
	case n != "1":
		return nil, failure.Newf(failure.Configuration, "the socket unit has one ListenStream=", "systemd handed over %.16q sockets, exactly one is expected", n)
	}
	return inherited(firstInherited)
}

// maxInherited bounds what systemd hands over.
const maxInherited = 256

// InheritedAll returns all sockets that systemd hands over to this process, which may be
// none. Each is as [Inherited] says.
func InheritedAll() ([]*net.UnixListener, error) {
	pid, text := announced()
	if pid != fmt.Sprint(os.Getpid()) {
		return nil, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 || n > maxInherited {
		return nil, failure.Newf(failure.Configuration, "", "systemd handed over %.16q sockets, at most %d are expected", text, maxInherited)
	}
	var out []*net.UnixListener
	for fd := range n {
		l, err := inherited(firstInherited + fd)
		if err != nil {
			return nil, err
		}
		out = append(out, l)
	}
	return out, nil
}

// announced returns for which process there are how many sockets, and removes what says
// so.
func announced() (pid, n string) {
	pid, n = os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(name)
	}
	return pid, n
}

func inherited(fd int) (*net.UnixListener, error) {
	unix.CloseOnExec(fd)
	refuse := func(what string) error {
		_ = unix.Close(fd)
		return failure.Newf(failure.Configuration, "ListenStream=/PATH in the socket unit", "what systemd handed over is %s", what)
	}
	for _, check := range []struct {
		option, want int
		otherwise    string
	}{
		{unix.SO_DOMAIN, unix.AF_UNIX, "not a unix socket"},
		{unix.SO_TYPE, unix.SOCK_STREAM, "not a stream socket"},
		{unix.SO_ACCEPTCONN, 1, "a socket that does not listen"},
	} {
		got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, check.option)
		switch {
		case errors.Is(err, unix.ENOTSOCK), errors.Is(err, unix.EBADF):
			return nil, refuse("not a socket")
		case err != nil:
			return nil, err
		case got != check.want:
			return nil, refuse(check.otherwise)
		}
	}
	f := os.NewFile(uintptr(fd), "socket of systemd")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(false) // it is systemd's, and serves the next start too
	return u, nil
}
