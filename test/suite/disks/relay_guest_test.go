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
	// The message with the number lose, counted from 1, does not arrive, or what it is
	// answered with does not.
	messages, lose int
	answer         bool
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
			_, _ = io.Copy(pair[0], &passing{r, pair[1], pair[1] == in})
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

// count counts the node's messages from now on, and loses one of them unless that is 0.
func (r *relay) count(lose int, answer bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.messages, r.lose, r.answer = 0, lose, answer
}

func (r *relay) counted() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.messages
}

// passing is one direction of a connection. A message is what arrives in one piece.
type passing struct {
	*relay
	from net.Conn
	node bool // it comes from the node
}

func (p *passing) Read(b []byte) (int, error) {
	n, err := p.from.Read(b)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.node && n > 0 {
		if p.messages++; p.messages == p.lose && !p.answer {
			return 0, io.ErrUnexpectedEOF
		}
	}
	if !p.node && n > 0 && p.lose > 0 && p.answer && p.messages >= p.lose {
		p.lose = 0 // once
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}
