package keysocket

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// caller is the process at the other end of a connection.
type caller struct {
	uid  uint32
	pid  int32
	fd   int // of the process
	raw  []byte
	name Name
	unit string // empty until it is known
}

// What speaks against a caller.
var (
	errNotRoot   = errors.New("the caller is not root")
	errNamespace = errors.New("the caller is in another namespace")
	errNotHolder = errors.New("the process with the caller's number does not hold the socket that calls")
	errEnded     = errors.New("the caller has ended")
	errNoRule    = errors.New("no rule of key_socket.consumers names this unit with what it asks for")
)

// callerOf asks the kernel who calls. The result is never nil.
func callerOf(conn net.Conn) (*caller, error) {
	p := &caller{fd: -1}
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return p, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil {
			return
		}
		p.uid, p.pid = cred.Uid, cred.Pid
		p.raw, err = peerName(fd)
	})
	if err = errors.Join(controlErr, err); err != nil {
		return p, err
	}
	if p.name, err = ParseName(p.raw); err != nil {
		return p, err
	}
	switch {
	case p.uid != 0:
		return p, errNotRoot
	case p.pid <= 0: // the kernel has no number for it here
		return p, fmt.Errorf("%w: pid", errNamespace)
	}
	if p.fd, err = unix.PidfdOpen(int(p.pid), 0); err != nil {
		return p, fmt.Errorf("%w: %w", errEnded, err)
	}
	return p, nil
}

// peerName returns the bytes of the other end's name. Those of the net package end at the
// first zero, and an abstract name may have more of them.
func peerName(fd uintptr) ([]byte, error) {
	var addr unix.RawSockaddrUnix
	size := uint32(unsafe.Sizeof(addr))
	if _, _, errno := unix.RawSyscall(unix.SYS_GETPEERNAME, fd, uintptr(unsafe.Pointer(&addr)), uintptr(unsafe.Pointer(&size))); errno != 0 {
		return nil, fmt.Errorf("getpeername: %w", errno)
	}
	n := int(size) - int(unsafe.Offsetof(addr.Path))
	if n < 0 || n > len(addr.Path) {
		return nil, fmt.Errorf("getpeername: %d bytes", size)
	}
	out := make([]byte, n)
	for i := range out {
		out[i] = byte(addr.Path[i])
	}
	return out, nil
}

func (p *caller) close() { _ = unix.Close(p.fd) }

// wait returns true when the process has ended, and false when ctx does.
func (p *caller) wait(ctx context.Context) bool {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if p.ended() {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
}

func (p *caller) ended() bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, 0)
	return err == nil && n > 0
}

// admit decides about a caller. Everything is read of the process that its descriptor
// names: it has not ended by the time that the last of it was read.
func (s *Server) admit(p *caller) (*Rule, error) {
	rule := s.rule(p.name)
	if rule == nil {
		return nil, errNoRule
	}
	cgroup, err := readSome(p.proc("cgroup"), 64<<10)
	if err != nil {
		return nil, err
	}
	if p.unit, err = unitOf(cgroup); err != nil {
		return nil, err
	}
	for i := range s.Rules {
		if rule = &s.Rules[i]; rule.allows(p.name, p.unit) {
			break
		}
		rule = nil
	}
	if rule == nil {
		return nil, errNoRule
	}
	namespaces := []string{"user", "pid", "mnt"}
	if rule.Credential != "" {
		namespaces = namespaces[:2] // systemd has made the unit's own by then
	}
	for _, ns := range namespaces {
		theirs, err := os.Readlink(p.proc("ns/" + ns))
		if err != nil {
			return nil, err
		}
		mine, err := os.Readlink("/proc/self/ns/" + ns)
		if err != nil {
			return nil, err
		}
		if theirs != mine {
			return nil, fmt.Errorf("%w: %s", errNamespace, ns)
		}
	}
	if err := p.holdsSocket(); err != nil {
		return nil, err
	}
	if p.ended() {
		return nil, errEnded
	}
	return rule, nil
}

// rule returns one that the name asks for, whatever the unit.
func (s *Server) rule(n Name) *Rule {
	for i := range s.Rules {
		if r := &s.Rules[i]; r.asks(n) {
			return r
		}
	}
	return nil
}

// asks reports whether the name asks for what the rule gives.
func (r *Rule) asks(n Name) bool {
	if r.Credential != "" {
		return r.Credential == n.Credential && r.Unit == n.Unit
	}
	return r.Mapping != "" && r.Mapping == n.Mapping
}

// allows reports whether name and unit agree with the rule, and so with each other.
func (r *Rule) allows(n Name, unit string) bool { return r.asks(n) && r.Unit == unit }

func (p *caller) proc(file string) string { return fmt.Sprintf("/proc/%d/%s", p.pid, file) }

// holdsSocket makes sure that the process has the socket that calls open: another one,
// which had its number before, or a child of that, does not speak for it.
func (p *caller) holdsSocket() error {
	inode, err := p.inode()
	if err != nil {
		return err
	}
	dir, err := os.Open(p.proc("fd"))
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(256)
		for _, n := range names {
			if to, err := os.Readlink(p.proc("fd/" + n)); err == nil && to == "socket:["+inode+"]" {
				return nil
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return errNotHolder
		case err != nil:
			return err
		}
	}
}

// inode returns the number of the socket that has the caller's name, in its network
// namespace.
func (p *caller) inode() (string, error) {
	f, err := os.Open(p.proc("net/unix"))
	if err != nil {
		return "", err
	}
	defer f.Close()
	// The kernel writes the first zero of an abstract name as @, and names are plain.
	name := "@" + string(p.raw[1:])
	found := ""
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// Num RefCount Protocol Flags Type St Inode Path
		fields := strings.Fields(lines.Text())
		if len(fields) != 8 || fields[7] != name {
			continue
		}
		// The kernel writes names as they are: one with a line's end in it can say
		// anything. There are not two sockets of one name.
		if found != "" {
			return "", errNotHolder
		}
		found = fields[6]
	}
	if err := lines.Err(); err != nil {
		return "", err
	}
	if found == "" {
		return "", errNotHolder
	}
	return found, nil
}

func readSome(path string, most int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, most))
	return string(data), err
}
