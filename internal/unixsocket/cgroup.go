package unixsocket

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrCgroup means that the control group of a caller is not known.
var ErrCgroup = errors.New("the caller's control group is not known")

const (
	maxCgroupFile = 64 << 10
	maxCgroupPath = 4 << 10
)

// cgroupOf returns the path of the control group in which the process at the other end
// is, as this process sees it.
//
// The kernel tells it by number, and a number may be another process's by the time that
// /proc is read: one that calls can leave the connection to a child, end, and wait for a
// better one to get its number. So a descriptor of the process is taken first, from the
// connection itself where the kernel (6.5) has that, and it must not have ended after the
// read. An older kernel gives a descriptor by number, which leaves the moment between the
// caller's connect and this function.
func cgroupOf(c syscall.Conn, pid int32) (string, error) {
	if pid <= 0 {
		return "", fmt.Errorf("%w: it is in a pid namespace that this process does not see", ErrCgroup)
	}
	fd, err := processOf(c, pid)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrCgroup, err)
	}
	defer unix.Close(fd)
	text, err := readCgroup(pid)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrCgroup, err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); err != nil || n > 0 {
		return "", fmt.Errorf("%w: the process that connected has ended", ErrCgroup)
	}
	return parseCgroup(text)
}

// processOf returns a descriptor of the process at the other end.
func processOf(c syscall.Conn, pid int32) (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	controlErr := raw.Control(func(s uintptr) {
		fd, err = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	})
	if err == nil && controlErr == nil {
		unix.CloseOnExec(fd)
		return fd, nil
	}
	if errors.Is(err, unix.ENOPROTOOPT) {
		return unix.PidfdOpen(int(pid), 0)
	}
	return -1, errors.Join(controlErr, err)
}

func readCgroup(pid int32) (string, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxCgroupFile+1))
	return string(data), err
}

// parseCgroup reads the text of /proc/PID/cgroup: the path in the unified hierarchy.
// Hierarchies of version 1 are left out, since they delegate worse. The kernel writes names
// as they are, and who makes a group chooses its name: one with blanks or control
// characters in it, as the kernel's own " (deleted)", is no path here, and neither is one
// above the root of this process's view.
func parseCgroup(text string) (string, error) {
	if len(text) > maxCgroupFile || !strings.HasSuffix(text, "\n") {
		return "", fmt.Errorf("%w: /proc has %d bytes of it, which is not a list of lines", ErrCgroup, len(text))
	}
	found := ""
	for line := range strings.Lines(text) {
		p, unified := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::")
		switch {
		case !unified:
			continue
		case found != "":
			return "", fmt.Errorf("%w: /proc names two", ErrCgroup)
		case !plainCgroup(p):
			return "", fmt.Errorf("%w: %.200q is not a plain path", ErrCgroup, p)
		}
		found = p
	}
	if found == "" {
		return "", fmt.Errorf("%w: there are no unified control groups here", ErrCgroup)
	}
	return found, nil
}

func plainCgroup(p string) bool {
	blank := func(r rune) bool { return r <= ' ' || r > '~' }
	return len(p) <= maxCgroupPath && path.IsAbs(p) && path.Clean(p) == p && !strings.HasPrefix(p, "/..") && !strings.ContainsFunc(p, blank)
}
