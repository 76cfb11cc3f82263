package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/luks"
)

// While a volume is young, another node that lost the race to create it may still
// wake up and write its own header: it is looked at more often.
const (
	youngFor   = 5 * time.Minute
	youngEvery = 10 * time.Second
)

// WatchHeaders compares the headers of open volumes with their disks until ctx
// ends. The kernel has the volume key as long as a volume is open, so damage would
// otherwise show at the next boot, when it is too late.
func (c *Volumes) WatchHeaders(ctx context.Context, every time.Duration) {
	if every <= 0 {
		return
	}
	tick := time.NewTicker(min(every, youngEvery))
	defer tick.Stop()
	last := map[string]time.Time{}
	began := map[string]time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			for _, id := range c.ids() {
				e := c.find(id)
				if !c.watched(e) {
					delete(began, id)
					continue
				}
				if began[id].IsZero() {
					began[id] = now
				}
				if now.Sub(began[id]) > youngFor && now.Sub(last[id]) < every {
					continue
				}
				last[id] = now
				go c.watchOne(ctx, id, e)
			}
		}
	}
}

func (c *Volumes) watched(e *entry) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return e.header != nil && (e.condition.state == Open || e.condition.state == Mounted)
}

// watchOne looks at one header, unless somebody works on the volume. A node that
// holds the writer's lease puts its own header back: it is the only one that can,
// as long as the kernel has the key.
func (c *Volumes) watchOne(ctx context.Context, id string, e *entry) {
	select {
	case e.turn <- struct{}{}:
		defer func() { <-e.turn }()
	default:
		return
	}
	soon, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	unlock, err := c.lockFile(soon, id)
	if err != nil {
		return
	}
	defer unlock()
	c.refresh(id, e)
	if !c.watched(e) {
		return
	}
	ctx = luks.WithPatience(ctx, c.DeviceWait)
	device := e.spec.DevicePath()
	err = luks.Matches(ctx, device, e.header)
	switch {
	case err == nil:
		return
	case ctx.Err() != nil:
		return
	case !errors.Is(err, luks.ErrHeaderChanged):
		c.warn(e, "header", "the header could not be read: "+err.Error())
		c.Log.Error("could not compare a header with its disk", "volume", id, "error", err)
		return
	}
	c.mu.Lock()
	ours := e.known.Changing
	c.mu.Unlock()
	if ours && c.finishHeader(ctx, id, e) {
		return
	}
	c.set(func() { e.alarms++ })
	c.Log.Error("ALARM: the header of an open volume was overwritten on its disk", "volume", id, "device", device, "error", err)
	if e.lease == nil || e.lease.lost || e.spec.ReadOnly {
		c.warn(e, "header", "it was overwritten on the disk while the volume is open: keyagent restore-header before it is closed")
		return
	}
	until, err := c.mayWriteBack(ctx, id, e)
	if err == nil {
		err = luks.WriteBack(ctx, device, e.header, until)
	}
	if err != nil {
		c.warn(e, "header", "it was overwritten on the disk, and could not be put back: "+err.Error())
		c.Log.Error("could not put a header back", "volume", id, "error", err)
		return
	}
	c.warn(e, "header", "it was overwritten on the disk while the volume was open, and was put back: find out who writes to this disk")
	c.Log.Error("put the header back from memory", "volume", id, "device", device)
}

// finishHeader puts the next header in front, where the agent that was about to do it was cut
// off. The key service is told at the next renewal of the lease.
func (c *Volumes) finishHeader(ctx context.Context, id string, e *entry) bool {
	until, err := c.mayWriteBack(ctx, id, e)
	if err == nil {
		err = luks.WriteBack(ctx, e.spec.DevicePath(), e.header, until)
	}
	if err != nil {
		return false
	}
	c.Log.Info("a change of the key was cut off, and its header is in front now", "volume", id)
	c.set(func() { e.known.Changing = false }) // what is found the next time is somebody else's
	if err := c.rememberKnown(e); err != nil {
		c.Log.Warn("could not keep the state of a volume", "volume", id, "error", err)
	}
	return true
}

var errNoLease = errors.New("this node holds no lease of the volume any more")

// mayWriteBack asks whether the volume is still this node's, and says until when. While it
// slept another one may have had it, and changed its key: what this node would put back then
// opens nothing any more.
func (c *Volumes) mayWriteBack(ctx context.Context, id string, e *entry) (luks.Deadline, error) {
	c.mu.Lock()
	var lease []byte
	if e.lease != nil {
		lease = e.lease.id
	}
	c.mu.Unlock()
	if lease == nil {
		return luks.Deadline{}, errNoLease
	}
	ctx, cancel := context.WithTimeout(ctx, renewPause)
	defer cancel()
	got, err := c.Keys.Renew(ctx, id, lease)
	if err == nil && got == nil {
		err = errNoLease
	}
	if err != nil {
		return luks.Deadline{}, fmt.Errorf("is the volume still this node's? %w", err)
	}
	return luks.DeadlineIn(got.Until - keyclient.Boottime()), nil
}
