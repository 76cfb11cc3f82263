package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/mount"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/luks"
)

// Close unmounts and closes a volume, whether or not anything still describes it.
// Closing a closed volume succeeds. If something uses it, everything stays as it
// was, and the error names who.
func (c *Volumes) Close(ctx context.Context, id string) (Volume, error) {
	e := c.find(id)
	if e == nil {
		return Volume{ID: id}, node.UnknownVolume(id)
	}
	give, err := c.take(ctx, id, e)
	if err != nil {
		return c.view(e), err
	}
	defer give()
	err = c.closeTaken(ctx, id, e)
	return c.view(e), err
}

// closeTaken is Close of a volume whose turn was taken.
func (c *Volumes) closeTaken(ctx context.Context, id string, e *entry) error {
	c.mu.Lock()
	waits := e.condition.state == Suspended && e.condition.running == Mounted && !e.spec.ReadOnly
	c.mu.Unlock()
	if waits { // unmounting writes, and would wait for ever, with the volume's turn
		return failure.Newf(failure.State, "resume it first; where the key service refuses it, only a good verdict lets it be written", "the volume is suspended, and its filesystem has to be written before it is closed")
	}
	if err := c.allowed(e, EventClose); err != nil {
		return err
	}
	if r, ok := c.recall(id); ok {
		// keyagent unlock may have opened it meanwhile, or an agent that ended before it was
		// done with it.
		c.set(func() {
			if e.known = r; e.spec.ID == "" {
				e.spec, e.dynamic = r.Spec, r.Dynamic
			}
		})
	}
	leaseID := e.known.LeaseID
	if err := classify(c.close(luks.WithPatience(ctx, c.DeviceWait), e)); err != nil {
		c.on(e, EventKept, nil)
		c.set(func() { e.lastErr = err })
		return err
	}
	c.drop(ctx, e)
	c.set(func() { e.known, e.header, e.lastErr, e.warnings = remembered{}, nil, nil, map[string]string{} })
	c.on(e, EventClosed, nil)
	if err := c.forget(id); err != nil {
		return err
	}
	if c.keepsLease(id, e) {
		c.Log.Info("the volume's lease stays here, with the key that is kept for an outage", "volume", id, "hint", "keyagent close --give-back "+id+" lets another machine have it")
	} else {
		c.release(ctx, id, leaseID)
	}
	c.Log.Info("volume is closed", "volume", id)
	return nil
}

func (c *Volumes) close(ctx context.Context, e *entry) error {
	m, err := c.status(ctx, e)
	if errors.Is(err, luks.ErrNotActive) {
		return c.closeBelow(ctx, e.spec.Name, e.known.UUID)
	}
	if err != nil {
		return err
	}
	source := sourceOf(m)
	if above := mount.Stacked(source.Device); len(above) > 0 {
		return failure.New(failure.DeviceBusy, fmt.Errorf("%w: %s lies on it", mount.ErrBusy, strings.Join(above, ", ")), "close that first")
	}
	if e.spec.Kind == node.Swap {
		if err := mount.SwapOff(m.Path); err != nil && !errors.Is(err, os.ErrInvalid) {
			c.Log.Warn("swapoff", "volume", e.spec.ID, "error", err)
		}
	}
	at, err := c.unmount(e, source)
	if err != nil {
		return err
	}
	if err := luks.Close(ctx, c.closeRequest(m)); err != nil && !errors.Is(err, luks.ErrNotActive) {
		return errors.Join(c.named(err, source, at), c.putBack(e, source, at))
	}
	return nil
}

// closeBelow makes sure that nothing is left of a volume whose mapping is gone: one below
// it would write until it is gone as well.
func (c *Volumes) closeBelow(ctx context.Context, name, uuid string) error {
	if uuid == "" {
		return nil
	}
	err := luks.Close(ctx, luks.CloseRequest{Name: name, UUID: uuid})
	if errors.Is(err, luks.ErrNotActive) {
		return nil
	}
	return err
}

// status is luks.Status for the mapping of an entry, and refuses one that is not
// the entry's.
func (c *Volumes) status(ctx context.Context, e *entry) (luks.Mapping, error) {
	m, err := luks.Status(ctx, e.spec.Name)
	if err != nil {
		return m, err
	}
	k := e.known
	if k.Spec.ID != "" && (k.UUID != m.UUID || m.Throwaway != e.spec.Throwaway() || !m.Cut && k.Device != (luks.DevNum{}) && k.Device != m.DataDevice) {
		return m, fmt.Errorf("%w: %s has the UUID %s and lies on %v; this volume's are %s and %v", luks.ErrNotOurs, m.Name, m.UUID, m.DataDevice, k.UUID, k.Device)
	}
	if k.Spec.ID == "" {
		return m, fmt.Errorf("%w: nothing here remembers that %s was opened", luks.ErrNotOurs, m.Name)
	}
	return m, nil
}

func (c *Volumes) closeRequest(m luks.Mapping) luks.CloseRequest {
	return luks.CloseRequest{Name: m.Name, UUID: m.UUID, Device: m.DataDevice, Throwaway: m.Throwaway}
}

// unmount takes the volume off its mount point and returns that, if it was there.
func (c *Volumes) unmount(e *entry, source mount.Source) (at string, err error) {
	for _, at := range slices.Compact([]string{e.known.Mount, e.spec.Mount}) {
		if at == "" {
			continue
		}
		on, err := mount.At(at)
		if err != nil {
			return "", err
		}
		if on != nil && on.Is(source.Device) {
			return at, mount.Unmount(source, at)
		}
	}
	all, err := mount.Table()
	if err != nil {
		return "", err
	}
	for _, on := range all {
		if on.Is(source.Device) {
			return "", failure.New(failure.DeviceBusy, fmt.Errorf("%w: somebody mounted it on %s", mount.ErrBusy, on.Point), "umount "+on.Point+", then try again")
		}
	}
	return "", nil
}

// named says who keeps a mapping busy.
func (c *Volumes) named(err error, source mount.Source, at string) error {
	if !errors.Is(err, luks.ErrDeviceBusy) {
		return err
	}
	return mount.Busy(source, at)
}

// putBack mounts a volume again that could not be closed: services must not write
// to the bare folder below.
func (c *Volumes) putBack(e *entry, source mount.Source, at string) error {
	if at == "" {
		return nil
	}
	_, err := mount.Mount(source, at, e.spec.Filesystem, mountOptions(e.spec, e.spec.ReadOnly))
	if err != nil {
		return fmt.Errorf("and it could not be mounted on %s again: %w", at, err)
	}
	return nil
}

// CloseAll closes every volume that is up, those inside others first. It goes on
// after an error, and returns the first.
func (c *Volumes) CloseAll(ctx context.Context) error {
	var first error
	for _, id := range c.byDepth() {
		if _, err := c.Close(ctx, id); err != nil {
			c.Log.Error("volume stays open", "volume", id, "error", err)
			if first == nil {
				first = in(id, err)
			}
		}
	}
	return first
}

// byDepth are the volumes that are up, the deepest mount point first.
func (c *Volumes) byDepth() []string {
	ids := c.ids()
	c.mu.Lock()
	defer c.mu.Unlock()
	depth := func(id string) int { return strings.Count(c.entries[id].spec.Mount, "/") }
	slices.SortStableFunc(ids, func(a, b string) int { return depth(b) - depth(a) })
	return slices.DeleteFunc(ids, func(id string) bool {
		s := c.entries[id].condition.state
		return s == Absent || s == Failed && c.entries[id].known.Spec.ID == ""
	})
}
