// Package unseal is a key service without its master secret: it takes shares of it from
// operators until there are enough, or it comes in another way, and gives nothing to anybody.
package unseal

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/shares"
)

// keepFor is how long shares wait for others. Operators who do not come together in that time
// begin anew.
const keepFor = time.Hour

// ErrDone means that the master secret is there already.
var ErrDone = errors.New("the key service is unsealed")

// Progress is how far it is.
type Progress struct {
	Split     string
	Threshold int
	Have      int
	Unsealed  bool
}

// Gatherer holds shares until there are enough. It is safe for concurrent use.
type Gatherer struct {
	sealed *shares.Sealed
	now    func() time.Time

	mu     sync.Mutex
	have   map[int]*shares.Share
	since  time.Time // of the first share
	done   bool
	used   []int
	opened chan *secret.Bytes // has room for the one that there will be
}

// NewGatherer returns one that has no shares.
func NewGatherer(s *shares.Sealed, now func() time.Time) *Gatherer {
	return &Gatherer{sealed: s, now: now, have: map[int]*shares.Share{}, opened: make(chan *secret.Bytes, 1)}
}

// Opened gives the master secret once there are enough shares. Who receives it closes it.
func (g *Gatherer) Opened() <-chan *secret.Bytes { return g.opened }

// Progress says how far it is.
func (g *Gatherer) Progress() Progress {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.expire()
	return g.progress()
}

func (g *Gatherer) progress() Progress {
	return Progress{g.sealed.ID(), g.sealed.Threshold, len(g.have), g.done}
}

// expire forgets shares that waited for too long. The lock is held.
func (g *Gatherer) expire() {
	if len(g.have) > 0 && !g.done && g.now().Sub(g.since) >= keepFor {
		_ = g.wipe()
	}
}

// Expire forgets shares that waited for too long, and reports how many.
func (g *Gatherer) Expire() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	before := len(g.have)
	g.expire()
	return before - len(g.have)
}

func (g *Gatherer) wipe() error {
	var errs []error
	for i, s := range g.have {
		errs = append(errs, s.Close())
		delete(g.have, i)
	}
	return errors.Join(errs...)
}

// Used are the shares that opened it, for people.
func (g *Gatherer) Used() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(g.used), " ", ", "), "[]")
}

// Close wipes what was given.
func (g *Gatherer) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	err := g.wipe()
	select {
	case master := <-g.opened:
		err = errors.Join(err, master.Close())
	default:
	}
	return err
}

// Take takes the master secret itself, which came in another way, and reports whether it is the
// first that came. It closes one that is not.
func (g *Gatherer) Take(master *secret.Bytes) (bool, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.done {
		return false, master.Close()
	}
	g.done = true
	g.opened <- master
	return true, g.wipe()
}

// Give takes a share, which it closes in any case: [shares.ErrForeign], [shares.ErrForged]. One
// that was given before changes nothing.
func (g *Gatherer) Give(s *shares.Share) (p Progress, err error) {
	wrong := g.sealed.Check(s) // takes a while, and nobody waits for it
	g.mu.Lock()
	defer g.mu.Unlock()
	g.expire()
	if g.done {
		return g.progress(), errors.Join(ErrDone, s.Close())
	}
	if wrong != nil {
		return g.progress(), errors.Join(wrong, s.Close())
	}
	if _, again := g.have[s.Index]; again {
		return g.progress(), s.Close()
	}
	if len(g.have) == 0 {
		g.since = g.now()
	}
	g.have[s.Index] = s
	if len(g.have) < g.sealed.Threshold {
		return g.progress(), nil
	}
	all := make([]*shares.Share, 0, len(g.have))
	for _, s := range g.have {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b *shares.Share) int { return a.Index - b.Index })
	master, err := g.sealed.Open(all)
	if err != nil {
		// Each share is right, and what they open is not: the file was changed.
		return g.progress(), errors.Join(fmt.Errorf("the shares are right, and the sealed secret is not what they sealed: %w", err), g.wipe())
	}
	g.done = true
	for _, s := range all {
		g.used = append(g.used, s.Index)
	}
	g.opened <- master
	p = g.progress()
	return p, g.wipe()
}
