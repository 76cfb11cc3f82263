package unixsocket

import (
	"errors"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Bounded accepts at most total connections at a time, and at most perUser of one
// user; more are closed at once. A quarter of the total is kept for root.
func Bounded(l *net.UnixListener, total, perUser int) net.Listener {
	return &bounded{UnixListener: l, total: total, perUser: perUser, users: map[uint32]int{}}
}

type bounded struct {
	*net.UnixListener
	total, perUser int

	mu    sync.Mutex
	all   int
	users map[uint32]int
}

// Accept implements net.Listener.
func (b *bounded) Accept() (net.Conn, error) {
	for {
		c, err := b.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := userOf(c)
		if err == nil && b.enter(uid) {
			return &counted{UnixConn: c, leave: sync.OnceFunc(func() { b.leave(uid) })}, nil
		}
		_ = c.Close()
	}
}

func (b *bounded) enter(uid uint32) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	limit := b.total
	if uid != 0 {
		limit -= b.total / 4
	}
	if b.all >= limit || b.users[uid] >= b.perUser {
		return false
	}
	b.all++
	b.users[uid]++
	return true
}

func (b *bounded) leave(uid uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all--
	if b.users[uid]--; b.users[uid] == 0 {
		delete(b.users, uid)
	}
}

// counted is a connection that gives its place back.
type counted struct {
	*net.UnixConn
	leave func()
}

// Close implements net.Conn.
func (c *counted) Close() error {
	c.leave()
	return c.UnixConn.Close()
}

func userOf(c *net.UnixConn) (uint32, error) {
	cred, err := credOf(c)
	if err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// credOf asks the kernel who is at the other end.
func credOf(c syscall.Conn) (cred *unix.Ucred, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	return cred, errors.Join(controlErr, err)
}
