package atls

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

// The defaults of [GateLimits].
const (
	DefaultMaxAttested = 4096
	DefaultMaxEach     = 32
	defaultMemory      = 32 << 20
)

// freeFrame is how much of a frame that arrives does not count: as much as any but
// evidence has, and most evidence.
const freeFrame = 64 << 10

// ErrFull means that there are as many attested connections as may be.
var ErrFull = errors.New("too many attested connections")

// GateLimits bound the connections behind a [Gate].
type GateLimits struct {
	// Waiting bounds connections that have not attested themselves, or have and then
	// said nothing. It must be positive.
	Waiting int
	// Attested bounds all others. Default DefaultMaxAttested.
	Attested int
	// Each bounds those of one machine. Default DefaultMaxEach.
	Each int
	// Memory bounds, in bytes, what frames take that are arriving or are judged, beyond
	// a small part of each. Default 32 MiB.
	Memory int
}

// Gate is a listener that bounds how many connections may wait at the same time, and
// what they may send. When one more arrives, it closes the oldest of those that have
// got the least far: first those without a TLS session, then those without a
// verdict, then those that have one and are silent. When frames take too much
// memory, the oldest with a large one goes. A flood of half-open connections
// therefore pushes out itself, and not a client that makes progress.
//
// A connection no longer waits once its deadline is lifted behind its verdict. Such
// ones are closed for one reason only: the machine behind them has too many, and its
// oldest gives way to its newest.
type Gate struct {
	net.Listener
	limits GateLimits

	mu       sync.Mutex
	waiting  [3]queue // by stage: no TLS session yet, no verdict, nothing said since
	count    int
	held     int // bytes
	attested int
	machines map[string][]*gatedConn // by identity, the oldest first
	evicted  uint64
	closed   bool
}

// NewGate guards l.
func NewGate(l net.Listener, limits GateLimits) *Gate {
	limits.Waiting = max(1, limits.Waiting)
	for _, d := range []struct {
		field *int
		value int
	}{{&limits.Attested, DefaultMaxAttested}, {&limits.Each, DefaultMaxEach}, {&limits.Memory, defaultMemory}} {
		if *d.field <= 0 {
			*d.field = d.value
		}
	}
	return &Gate{Listener: l, limits: limits, machines: map[string][]*gatedConn{}}
}

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
	if g.count == g.limits.Waiting {
		victim = g.evict(func(*gatedConn) bool { return true })
	}
	g.waiting[0].push(gc)
	g.count++
	g.mu.Unlock()
	victim.hangUp()
	return gc, nil
}

// evict takes the oldest of those out that got the least far. The lock is held.
func (g *Gate) evict(which func(*gatedConn) bool) *gatedConn {
	for i := range g.waiting {
		for c := g.waiting[i].first; c != nil; c = c.next {
			if which(c) {
				g.remove(c)
				g.evicted++
				return c
			}
		}
	}
	return nil
}

// Close implements net.Listener. It also closes the connections that wait: who is
// silent must not hold up a server that stops.
func (g *Gate) Close() error {
	err := g.Listener.Close()
	g.mu.Lock()
	g.closed = true
	var waiting []*gatedConn
	for i := range g.waiting {
		for c := g.waiting[i].first; c != nil; c = g.waiting[i].first {
			g.remove(c)
			waiting = append(waiting, c)
		}
	}
	g.mu.Unlock()
	for _, c := range waiting {
		c.hangUp()
	}
	return err
}

// Waiting returns how many connections wait now, and how many were pushed out so
// far.
func (g *Gate) Waiting() (now int, evicted uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.count, g.evicted
}

// Attested returns how many connections do not wait any more.
func (g *Gate) Attested() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.attested
}

// remove takes c out of everything. The lock is held.
func (g *Gate) remove(c *gatedConn) {
	if c.queue != nil {
		c.queue.remove(c)
		g.count--
	}
	g.held -= c.held
	c.held = 0
	if c.counted {
		g.attested--
		c.counted = false
	}
	if c.identity != "" {
		rest := slices.DeleteFunc(g.machines[c.identity], func(o *gatedConn) bool { return o == c })
		if g.machines[c.identity] = rest; len(rest) == 0 {
			delete(g.machines, c.identity)
		}
		c.identity = ""
	}
}

// guarded is how an exchange tells the gate how far it is.
type guarded interface {
	Encrypted()                     // after the TLS handshake
	Hold(n int)                     // while a frame of n bytes arrives
	Attested(identity string) error // after the exchange
}

// unguarded is a connection that no gate accepted.
type unguarded struct{}

func (unguarded) Encrypted()            {}
func (unguarded) Hold(int)              {}
func (unguarded) Attested(string) error { return nil }

type gatedConn struct {
	net.Conn
	gate       *Gate
	queue      *queue // nil once it waits no more
	prev, next *gatedConn
	held       int
	identity   string // once attested
	counted    bool   // as attested
}

// Encrypted implements guarded.
func (c *gatedConn) Encrypted() { c.stage(1) }

func (c *gatedConn) stage(n int) {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if c.queue != nil {
		c.queue.remove(c)
		c.gate.waiting[n].push(c)
	}
}

// Hold implements guarded. What was held is given back with the connection's place
// among those that wait.
func (c *gatedConn) Hold(n int) {
	g := c.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if n -= freeFrame; c.queue == nil || n <= c.held {
		return
	}
	g.held += n - c.held
	c.held = n
	for g.held > g.limits.Memory {
		victim := g.evict(func(o *gatedConn) bool { return o != c && o.held > 0 })
		if victim == nil {
			return // one frame always has room
		}
		victim.hangUp()
	}
}

// Attested implements guarded. The connection waits for its peer's first word.
func (c *gatedConn) Attested(identity string) error {
	g := c.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if c.queue == nil {
		return net.ErrClosed
	}
	c.queue.remove(c)
	g.waiting[2].push(c)
	g.held -= c.held
	c.held = 0
	if identity == "" {
		return nil
	}
	if all := g.machines[identity]; len(all) >= g.limits.Each {
		victim := all[0]
		g.remove(victim)
		g.evicted++
		victim.hangUp()
	}
	c.identity = identity
	g.machines[identity] = append(g.machines[identity], c)
	return nil
}

// SetDeadline implements net.Conn. A deadline that is lifted means that the peer of an
// attested connection has spoken.
func (c *gatedConn) SetDeadline(t time.Time) error {
	if t.IsZero() {
		if err := c.spoke(); err != nil {
			return errors.Join(err, c.Close())
		}
	}
	return c.Conn.SetDeadline(t)
}

func (c *gatedConn) spoke() error {
	g := c.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if c.queue != &g.waiting[2] {
		return nil
	}
	if g.attested >= g.limits.Attested {
		return fmt.Errorf("%w: %d", ErrFull, g.attested)
	}
	c.queue.remove(c)
	g.count--
	g.attested++
	c.counted = true
	return nil
}

// Close implements net.Conn.
func (c *gatedConn) Close() error {
	c.gate.mu.Lock()
	c.gate.remove(c)
	c.gate.mu.Unlock()
	return c.Conn.Close()
}

// hangUp closes what the gate took out. Nil is nothing.
func (c *gatedConn) hangUp() {
	if c != nil {
		_ = c.Conn.Close()
	}
}

// queue is a list in the order of arrival. The gate's lock guards it.
type queue struct {
	first, last *gatedConn
}

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
