package agent

import (
	"context"
	"errors"

	"github.com/keyagent/keyagent/luks"
)

// WatchMapped gives back the leases of those volumes that another program closes: it
// asked for the key, and nobody else says when it is done. A mapping that nobody has
// compared yet is compared as soon as that can be done. It ends with ctx.
func (c *Volumes) WatchMapped(ctx context.Context, ids []string) {
	events := deviceEvents(ctx, retryEvery)
	for {
		select {
		case <-ctx.Done():
			return
		case <-events:
		}
		for _, id := range ids {
			c.sweep(ctx, id)
			if e := c.find(id); e != nil && c.unlooked(ctx, id, e) {
				_ = c.TakeOver(ctx, e.spec) // what is wrong is in the log, and is tried again
			}
		}
	}
}

// sweep forgets a volume whose mapping was there and is gone.
func (c *Volumes) sweep(ctx context.Context, id string) {
	e := c.find(id)
	if e == nil || !c.vanished(ctx, id) {
		return
	}
	give, err := c.take(ctx, id, e)
	if err != nil {
		return
	}
	defer give()
	r, ok := c.recall(id)
	if !ok || !c.vanished(ctx, id) { // somebody worked on it meanwhile
		return
	}
	c.set(func() { e.known = r })
	c.reconcile(ctx, id, e)
	c.drop(ctx, e)
	c.set(func() { e.known, e.header = remembered{}, nil })
	if err := c.forget(id); err != nil {
		c.Log.Warn("could not forget the state of a volume", "volume", id, "error", err)
	}
	c.release(ctx, id, r.LeaseID)
	c.Log.Info("another program closed the volume", "volume", id)
}

// unlooked reports whether a volume is mapped with a key that was handed out, and nobody
// has compared it: its agent ended, or had no key service to ask for the key.
func (c *Volumes) unlooked(ctx context.Context, id string, e *entry) bool {
	c.mu.Lock()
	busy := e.condition.state == Opening || e.condition.state == Closing
	c.mu.Unlock()
	r, ok := c.recall(id)
	if busy || !ok || r.Sequence != 0 {
		return false
	}
	_, err := luks.Status(ctx, r.Spec.Name)
	return !errors.Is(err, luks.ErrNotActive)
}

// vanished reports whether a volume was mapped, and is not any more.
func (c *Volumes) vanished(ctx context.Context, id string) bool {
	r, ok := c.recall(id)
	if !ok || r.Sequence == 0 { // its key is just being handed out
		return false
	}
	_, err := luks.Status(ctx, r.Spec.Name)
	return errors.Is(err, luks.ErrNotActive)
}
