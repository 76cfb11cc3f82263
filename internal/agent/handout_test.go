package agent

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
)

// What became of a key that was handed out is awaited, and not for ever.
func TestAMappingIsAwaitedWithinBounds(t *testing.T) {
	const never, unseen = time.Hour, -time.Second
	for name, tt := range map[string]struct {
		there, complete, gone, anew, stop time.Duration // after which each happens
		took                              time.Duration
		found                             bool
	}{
		"it comes":                             {40 * time.Millisecond, 40 * time.Millisecond, never, never, never, 40 * time.Millisecond, true},
		"its node comes later":                 {40 * time.Millisecond, time.Second, never, never, never, time.Second, true},
		"who maps it ends, and its node comes": {time.Second, 3 * time.Second, 1500 * time.Millisecond, never, never, 3 * time.Second, true},
		"somebody asks again, and it is there": {time.Second, 3 * time.Second, never, 2 * time.Second, never, 3 * time.Second, true},
		"who maps it ends, and it is not":      {never, never, 2 * time.Second, never, never, 2 * time.Second, false},
		"nobody maps it, and nobody is seen":   {never, never, unseen, never, never, mapWithin, false},
		"a disk that hangs meanwhile":          {30 * time.Minute, 30 * time.Minute, never, never, never, mapWithin, false},
		"somebody asks again":                  {never, never, never, 3 * time.Second, never, 3 * time.Second, false},
		"the agent stops":                      {never, never, never, never, 5 * time.Second, 5*time.Second + stopLook, false},
		"it comes while the agent stops":       {6 * time.Second, 6 * time.Second, never, never, 5 * time.Second, 6 * time.Second, true},
		"it is there when the time is over":    {mapWithin - time.Second, never, never, never, never, mapWithin, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				after := func(d time.Duration) <-chan struct{} {
					c := make(chan struct{})
					timer := time.AfterFunc(d, func() { close(c) })
					t.Cleanup(func() { timer.Stop() })
					return c
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				stop := time.AfterFunc(tt.stop, cancel)
				defer stop.Stop()
				gone := after(tt.gone)
				if tt.gone == unseen {
					gone = nil
				}
				err := awaitMapping(ctx, gone, after(tt.anew), func() (bool, bool) {
					return time.Since(began) >= tt.there, time.Since(began) >= tt.complete
				})
				if took := time.Since(began); took != tt.took || (err == nil) != tt.found {
					t.Errorf("%v after %v", err, took)
				}
				want := errNotMapped
				if tt.gone == never && tt.anew == never {
					want = errUnlooked // somebody may still map it
				}
				if err != nil && (!errors.Is(err, want) || failure.Of(err).Class != failure.State) {
					t.Error(err)
				}
			})
		})
	}
}
