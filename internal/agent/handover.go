package agent

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/luks"
)

// handedOver are the volumes that the initrd left open and that OpenAll does not take
// over: they are not in the configuration, or opened on request alone.
func (c *Volumes) handedOver(configured []node.Volume) (out []node.Volume) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, e := range c.entries {
		if c.Initrd || !e.known.Initrd || !isUp(e.condition.state) {
			continue
		}
		i := slices.IndexFunc(configured, func(v node.Volume) bool { return v.ID == id })
		switch {
		case i < 0:
			// As the initrd had it, but for what this system does not do with it.
			v := e.known.Spec
			v.Mount, v.Format, v.From = "", false, nil
			out = append(out, v)
		case configured[i].OnRequest:
			out = append(out, configured[i])
		}
	}
	return out
}

// ProveHandedOver proves anew that this machine, as the real system has it, may have what
// its initrd left open, and that each mapping has its volume's key: also of volumes that
// are not configured. Until then a lease is not renewed. A refusal is final; where a key
// service, a disk or a TPM does not answer it is tried again until ctx ends.
func (c *Volumes) ProveHandedOver(ctx context.Context, handed []node.Volume) {
	var all sync.WaitGroup
	for _, v := range handed {
		all.Go(func() {
			for {
				_, err := c.Open(ctx, v, Intent{Mapped: true, NoWait: true})
				if err == nil || errors.Is(err, luks.ErrNotActive) || !passes(err) && failure.Of(err).Class != failure.NoDevice {
					return
				}
				if pause(ctx, handoverPause) != nil {
					return
				}
			}
		})
	}
	all.Wait()
}

// handoverPause is between two attempts, each of which has the key client's own.
const handoverPause = 10 * time.Second
