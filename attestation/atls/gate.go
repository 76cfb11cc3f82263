package atls

import (
	"errors"
	"net"
	"sync"
)

// Gate is a listener that bounds how many connections may be unattested at the
// same time. When one more arrives, it closes the oldest of those that have got
// the least far: first those without a TLS session, then those with one. A
// flood of half-open connections therefore pushes out itself, and not a client
// that makes progress. Attested connections are never closed.
type Gate struct {
	net.Listener
	limit int

	mu      sync.Mutex
	waiting [2]queue // by stage: no TLS session yet, TLS session but no verdict
	count   int
	evicted uint64
	closed  bool
}

// NewGate guards l. limit must be positive.
func NewGate(l net.Listener, limit int) *Gate { return &Gate{Listener: l, limit: max(1, limit)} }

// Accept implements net.Listener.
func (g *Gate) Accept() (net.Conn, error) {
	c, err := g.Listener.Accept()
	if err != nil {
		return nil, err
	}
	gc := &gatedConn{Conn: c, gate: g}
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return nil, errors.Join(net.ErrClosed, c.Close())
	}
	var victim *gatedConn
	if g.count == g.limit {
		if victim = g.waiting[0].oldest(); victim == nil {
			victim = g.waiting[1].oldest()
		}
		g.remove(victim)
		g.evicted++
	}
	g.waiting[0].push(gc)
	g.count++
	g.mu.Unlock()
	if victim != nil {
		_ = victim.Conn.Close()
	}
	return gc, nil
}

// Close implements net.Listener. It also closes the connections that are not
// attested yet: who is silent must not hold up a server that stops.
func (g *Gate) Close() error {
	err := g.Listener.Close()
	g.mu.Lock()
	g.closed = true
	var waiting []*gatedConn
	for i := range g.waiting {
		for c := g.waiting[i].oldest(); c != nil; c = g.waiting[i].oldest() {
			g.remove(c)
			waiting = append(waiting, c)
		}
	}
	g.mu.Unlock()
	for _, c := range waiting {
		_ = c.Conn.Close()
	}
	return err
}

// Waiting returns how many connections are unattested now, and how many were
// pushed out so far.
func (g *Gate) Waiting() (now int, evicted uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.count, g.evicted
}

// remove takes c out of its queue. The lock is held.
func (g *Gate) remove(c *gatedConn) {
	if c.queue != nil {
		c.queue.remove(c)
		g.count--
	}
}

type gatedConn struct {
	net.Conn
	gate       *Gate
	queue      *queue // nil once attested or closed
	prev, next *gatedConn
}

// Encrypted is called after the TLS handshake.
func (c *gatedConn) Encrypted() {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if c.queue != nil {
		c.queue.remove(c)
		c.gate.waiting[1].push(c)
	}
}

// Attested is called after an accepting verdict.
func (c *gatedConn) Attested() { c.leave() }

func (c *gatedConn) leave() {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	c.gate.remove(c)
}

// Close implements net.Conn.
func (c *gatedConn) Close() error {
	c.leave()
	return c.Conn.Close()
}

// queue is a list in the order of arrival. The gate's lock guards it.
type queue struct {
	first, last *gatedConn
}

func (q *queue) oldest() *gatedConn { return q.first }

func (q *queue) push(c *gatedConn) {
	c.queue, c.prev, c.next = q, q.last, nil
	if q.last == nil {
		q.first = c
	} else {
		q.last.next = c
	}
	q.last = c
}

func (q *queue) remove(c *gatedConn) {
	if c.prev == nil {
		q.first = c.next
	} else {
		c.prev.next = c.next
	}
	if c.next == nil {
		q.last = c.prev
	} else {
		c.next.prev = c.prev
	}
	c.queue, c.prev, c.next = nil, nil, nil
}
