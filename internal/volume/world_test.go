package volume

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/memfs"
)

// clock stands still unless it is moved.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func newClock() *clock { return &clock{at: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) move(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func newKMS(t testing.TB) kms.KMS {
	t.Helper()
	m, err := secret.From([]byte("0123456789abcdef"))
	if err != nil {
		t.Fatal(err)
	}
	k, err := cluster.New(cluster.Options{MasterSecret: m})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func newStore(t testing.TB, s storage.Storage, now func() time.Time, alone bool) *Store {
	t.Helper()
	k := newKMS(t)
	records, err := macstore.Open(context.Background(), k, s, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { records.Close() })
	return NewStore(Options{KMS: k, Records: records, Now: now, Alone: alone})
}

var (
	one      = Terms{Writers: policy.WritersOne, Term: 2 * time.Minute}
	expiring = Terms{Writers: policy.WritersOne, Term: 2 * time.Minute, Expiry: true}
	many     = Terms{Writers: policy.WritersMany, Term: 2 * time.Minute}
	readers  = Terms{Writers: policy.WritersReaders, Term: 2 * time.Minute}
)

// caller is a node. Without a machine, nothing tells it from another.
func caller(node, machine string) *Caller {
	return &Caller{Holder: Holder{Machine: machine, Name: "id of " + node, Node: node}, Channel: hex.EncodeToString(fill(node[len(node)-1], 32)), Protocol: 2}
}

func (c *Caller) with(id string) *Caller {
	d := *c
	d.Presents = id
	return &d
}

func fill(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

func header(b byte) Header {
	return Header{Generation: 1, KeyVersion: 1, MAC: fill(b, 32), CopyMACs: [][]byte{fill(b+1, 32), fill(b+2, 32)}}
}

type world struct {
	t     testing.TB
	clock *clock
	disk  storage.Storage
	*Store
}

func newWorld(t testing.TB) *world {
	c, disk := newClock(), memfs.New()
	w := &world{t, c, disk, newStore(t, disk, c.now, true)}
	w.obtain()
	return w
}

func (w *world) obtain() {
	w.t.Helper()
	if _, err := w.Obtain(context.Background(), "data-1", "grant", 0); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) begin(c *Caller, attempt byte, h Header) error {
	_, err := w.Update(context.Background(), "data-1", func(r *Record) error { return r.Begin(c, fill(attempt, 16), h, w.clock.now()) })
	return err
}

func (w *world) stands(c *Caller, attempt byte, t Terms) (*Record, error) {
	return w.Update(context.Background(), "data-1", func(r *Record) error {
		return r.Stands(c, fill(attempt, 16), t, NewID(), w.clock.now())
	})
}

func (w *world) confirm(id []byte, mac byte, keep bool) error {
	_, err := w.Update(context.Background(), "data-1", func(r *Record) error { return r.Confirm(id, 1, 1, fill(mac, 32), keep) })
	return err
}

func (w *world) takes(c *Caller, t Terms) (*Record, error) {
	id := NewID()
	return w.Update(context.Background(), "data-1", func(r *Record) error { return r.Take(c, t, id, w.Ends(r), w.clock.now()) })
}

// active makes the volume active, by c.
func (w *world) active(c *Caller, t Terms) *Record {
	w.t.Helper()
	if err := w.begin(c, 1, header(0x10)); err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.stands(c, 1, t); err != nil {
		w.t.Fatal(err)
	}
	if err := w.confirm(fill(1, 16), 0x10, t.Writers == policy.WritersOne); err != nil {
		w.t.Fatal(err)
	}
	r, err := w.Get(context.Background(), "data-1")
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func is(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}
