//go:build umlguest

package disks

import (
	"io"
	"net"
	"sync"
	"testing"
)

// relay is a way to the key service that can be cut.
type relay struct {
	port string

	mu    sync.Mutex
	off   bool
	conns []net.Conn
}

func newRelay(t testing.TB, to string) *relay {
	t.Helper()
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	t.Cleanup(func() { l.Close() })
	r := &relay{}
	_, r.port, _ = net.SplitHostPort(l.Addr().String())
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			r.carry(in, to)
		}
	}()
	return r
}

func (r *relay) carry(in net.Conn, to string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.off {
		in.Close()
		return
	}
	out, err := net.Dial("tcp", to)
	if err != nil {
		in.Close()
		return
	}
	r.conns = append(r.conns, in, out)
	for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
		go func() {
			_, _ = io.Copy(pair[0], pair[1])
			pair[0].Close()
			pair[1].Close()
		}()
	}
}

func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.off = true
	for _, c := range r.conns {
		c.Close()
	}
	r.conns = nil
}

func (r *relay) mend() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.off = false
}
