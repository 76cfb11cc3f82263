package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/luks"
)

// Retirer ends the life of a volume at the key service.
type Retirer interface {
	Retire(ctx context.Context, volume string, lease []byte) (uuid string, kept bool, err error)
}

// Retire ends the life of a closed volume: the key service destroys its key, and then its
// header is erased from the disk, as far as that is here. Nobody opens the volume any more.
func (c *Volumes) Retire(ctx context.Context, id string) (Volume, error) {
	return c.with(ctx, id, func(ctx context.Context, e *entry) error {
		c.mu.Lock()
		state, lastID := e.condition.state, e.lastID
		c.mu.Unlock()
		switch {
		case e.spec.Throwaway():
			return errThrowaway
		case state != Absent && state != Failed:
			return failure.Newf(failure.State, "close it first", "the volume is %s", state)
		}
		if _, err := luks.Status(ctx, e.spec.Name); !errors.Is(err, luks.ErrNotActive) {
			return failure.Newf(failure.DeviceBusy, "close it first", "something is mapped as %s", e.spec.Name)
		}
		var lease []byte
		if r, ok := c.recall(id); ok {
			lease = r.LeaseID
		}
		uuid, kept, err := c.Keys.Retire(ctx, id, lease)
		if err != nil {
			return err
		}
		c.drop(ctx, e)
		if err := c.forget(id); err != nil {
			c.Log.Warn("could not forget the state of a volume", "volume", id, "error", err)
		}
		c.Log.Info("the volume is retired: its key is destroyed", "volume", id, "uuid", uuid, "correlation_id", lastID)
		if kept {
			c.Log.Warn("the key service's storage may keep the key of a retired volume: its audit log says why", "volume", id)
		}
		if !exists(e.spec.DevicePath()) {
			return failure.Newf(failure.State, "what is on the disk opens with no key any more; run this again where the disk is, to erase its header as well",
				"the volume is retired, and its disk %s is not here", e.spec.DevicePath())
		}
		if err := luks.Erase(ctx, e.spec.DevicePath(), uuid); err != nil {
			return fmt.Errorf("the volume is retired, and its header is still on the disk: %w", err)
		}
		return nil
	})
}
