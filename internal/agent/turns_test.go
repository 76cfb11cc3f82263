package agent

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Hundreds of volumes that are created at once take turns, each gets its own, and one
// that gives up waits for nobody.
func TestFirstFormatsTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewVolumes(Options{})
		var mu sync.Mutex
		var wg sync.WaitGroup
		now, most, done := 0, 0, 0
		count := func(by int) {
			mu.Lock()
			defer mu.Unlock()
			now += by
			most = max(most, now)
		}
		for range 256 {
			wg.Go(func() {
				release, err := c.formatTurn(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				count(1)
				time.Sleep(time.Second)
				count(-1)
				release()
				mu.Lock()
				done++
				mu.Unlock()
			})
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := c.formatTurn(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("one that gave up: %v", err)
		}
		wg.Wait()
		if done != 256 || most != maxFormats {
			t.Errorf("%d of 256, %d at a time", done, most)
		}
	})
}
