package tdx

import (
	"crypto/sha256"
	"encoding/binary"
	"sync"
	"time"
)

// cache remembers what verified, since a machine comes back with the same chain,
// collateral and quoting enclave for weeks. What it remembers holds for exactly
// these bytes, and only between two dates.
type cache[V any] struct {
	mu    sync.Mutex
	known map[cacheKey]cached[V]
	// limit bounds the cache; a full one is emptied.
	limit int
}

type cacheKey [sha256.Size]byte

type cached[V any] struct {
	value V
	valid validity
}

// keyOf is a digest over parts, each with its length.
func keyOf(parts ...[]byte) (key cacheKey) {
	h := sha256.New()
	var size [4]byte
	for _, p := range parts {
		binary.BigEndian.PutUint32(size[:], uint32(len(p)))
		h.Write(size[:])
		h.Write(p)
	}
	h.Sum(key[:0])
	return key
}

func (c *cache[V]) get(key cacheKey, now time.Time) (v V, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.known[key]
	if !ok || !e.valid.holds(now) {
		return v, false
	}
	return e.value, true
}

func (c *cache[V]) add(key cacheKey, v V, valid validity) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil || len(c.known) >= c.limit {
		c.known = map[cacheKey]cached[V]{}
	}
	c.known[key] = cached[V]{v, valid}
}

// validity is a span of time, both ends included.
type validity struct{ from, to time.Time }

func forever() validity { return validity{to: time.Unix(1<<40, 0)} }

// narrow makes the span end where another one ends.
func (v *validity) narrow(from, to time.Time) {
	if from.After(v.from) {
		v.from = from
	}
	if to.Before(v.to) {
		v.to = to
	}
}

func (v validity) holds(now time.Time) bool { return !now.Before(v.from) && !now.After(v.to) }
