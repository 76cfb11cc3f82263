package keyservice

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
)

// forgetEvery is how often what keys left in the heap is erased, at most.
const forgetEvery = 2 * time.Second

// forgetting erases what computations with keys left behind. Each takes a garbage
// collection, so that many requests share one, and an idle service makes none.
type forgetting struct {
	dirty atomic.Bool
}

// used says that keys were worked with, those of the records among them.
func (f *forgetting) used() { f.dirty.Store(true) }

// loop erases until ctx ends, and once more then.
func (f *forgetting) loop(ctx context.Context) {
	tick := time.NewTicker(forgetEvery)
	defer tick.Stop()
	f.used() // by the start
	for {
		select {
		case <-ctx.Done():
			secret.Forget()
			return
		case <-tick.C:
			if f.dirty.Swap(false) {
				secret.Forget()
			}
		}
	}
}
