package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/measured"
	"github.com/keyagent/keyagent/internal/node"
)

// boot is the opening of all configured volumes: each as soon as those that it
// needs are up, and none later than that.
type boot struct {
	*Volumes
	all  []node.Volume
	done map[string]chan struct{}
	errs map[string]error
	mu   sync.Mutex
}

// OpenAll opens every volume. It returns when those that are not optional are open,
// or one of them failed; optional ones go on in wait, which the caller waits for.
// The error is that of the first volume in the configuration that did not open and
// is not optional.
func (c *Volumes) OpenAll(ctx context.Context, all []node.Volume) (wait func(), err error) {
	b := &boot{Volumes: c, all: all, done: map[string]chan struct{}{}, errs: map[string]error{}}
	for _, v := range all {
		c.Know(v)
		b.done[v.ID] = make(chan struct{})
	}
	var required, optional sync.WaitGroup
	for _, v := range all {
		if v.OnRequest {
			continue
		}
		group := &required
		if v.Optional {
			group = &optional
		}
		group.Go(func() { b.open(ctx, v) })
	}
	required.Wait()
	return optional.Wait, b.first()
}

// open opens one volume when its turn has come.
func (b *boot) open(ctx context.Context, v node.Volume) {
	defer close(b.done[v.ID])
	err := b.ready(ctx, v)
	if err == nil {
		_, err = b.Open(ctx, v, Intent{NoWait: v.Optional})
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.errs[v.ID] = err
}

// ready waits for the volumes that v needs.
func (b *boot) ready(ctx context.Context, v node.Volume) error {
	for _, id := range node.Needs(b.all, &v) {
		select {
		case <-b.done[id]:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		b.mu.Lock()
		err := b.errs[id]
		b.mu.Unlock()
		if err != nil {
			return b.blocked(v, id)
		}
	}
	return nil
}

// blocked marks a volume as failed because of another one.
func (b *boot) blocked(v node.Volume, needed string) error {
	err := blockedBy(needed)
	e := b.entryOf(v.ID)
	b.on(e, EventOpen, nil)
	b.on(e, EventFail, err)
	b.set(func() { e.lastErr = err })
	return err
}

func (b *boot) first() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	var blocked error
	for _, v := range b.all {
		err := b.errs[v.ID]
		switch {
		case err == nil || v.Optional:
		case errors.Is(err, ErrBlocked):
			blocked = cmp.Or(blocked, in(v.ID, err)) // the cause is worth more than what it blocks
		default:
			return in(v.ID, err)
		}
	}
	return blocked
}

// retryEvery is how often disks that are not there are looked for without a reason.
const retryEvery = 10 * time.Second

// OpenLate opens volumes whose disks were not there at first, and what needs them,
// when udev shows them, and now and then those that failed in a way that may pass. It ends
// with ctx.
func (c *Volumes) OpenLate(ctx context.Context, all []node.Volume) {
	events := deviceEvents(ctx, retryEvery)
	tried := map[string]time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-events:
		}
		for _, v := range all {
			again := time.Since(tried[v.ID]) >= retryEvery
			if !v.OnRequest && c.mayOpen(v.ID, again) && c.needsAreUp(all, &v) {
				tried[v.ID] = time.Now()
				if _, err := c.Open(ctx, v, Intent{NoWait: true}); err == nil {
					c.Log.Info("a volume is open after all", "volume", v.ID)
				}
			}
		}
	}
}

// mayOpen reports whether a volume failed for want of its disk, and the disk is there by
// now, or because of another volume; or, if it is time again, in a way that may pass. One
// that was cut off its disk is for a person.
func (c *Volumes) mayOpen(id string, again bool) bool {
	e := c.find(id)
	if e == nil {
		return false
	}
	c.mu.Lock()
	state, err, device, fenced, withheld := e.condition.state, e.lastErr, e.spec.DevicePath(), e.warnings["fence"] != "", e.known.Withheld
	c.mu.Unlock()
	switch {
	case state == Suspended && withheld && err != nil: // nobody was there to ask
		return again && passes(err)
	case state != Failed || err == nil || fenced:
		return false
	case errors.Is(err, errAbsent):
		return exists(device)
	case errors.Is(err, ErrBlocked):
		return true
	}
	return again && (passes(err) || errors.Is(err, measured.ErrNoRegister))
}

func (c *Volumes) needsAreUp(all []node.Volume, v *node.Volume) bool {
	for _, id := range node.Needs(all, v) {
		e := c.find(id)
		if e == nil {
			return false
		}
		c.mu.Lock()
		up := isUp(e.condition.state) && e.condition.state != Suspended
		c.mu.Unlock()
		if !up {
			return false
		}
	}
	return true
}

// ErrBlocked means that a volume was not opened because another one is not up.
var ErrBlocked = errors.New("it needs another volume")

func blockedBy(id string) error {
	return failure.New(failure.State, fmt.Errorf("%w: %q is not up", ErrBlocked, id), "see what is wrong with that one")
}
