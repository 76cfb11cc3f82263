package agent

import (
	"context"
	"errors"

	"github.com/keyagent/keyagent/luks"
)

// WatchMapped gives back the leases of those volumes that another program closes: it
// asked for the key, and nobody else says when it is done. It ends with ctx.
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

// vanished reports whether a volume was mapped, and is not any more.
func (c *Volumes) vanished(ctx context.Context, id string) bool {
	r, ok := c.recall(id)
	if !ok || r.Sequence == 0 { // its key is just being handed out
		return false
	}
	_, err := luks.Status(ctx, r.Spec.Name)
	return errors.Is(err, luks.ErrNotActive)
}
