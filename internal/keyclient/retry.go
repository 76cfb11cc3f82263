package keyclient

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
)

// Retry bounds how long the key service is tried. Only what another try may
// change is tried again.
type Retry struct {
	Budget time.Duration // in all
	First  time.Duration // pause after the first failure
	Max    time.Duration // longest pause
}

// DefaultRetry suits a boot.
var DefaultRetry = Retry{Budget: 5 * time.Minute, First: 500 * time.Millisecond, Max: 15 * time.Second}

// try calls f until it succeeds, fails in a way that no other try can change, or
// the budget is used up.
func (c *Client) try(ctx context.Context, f func(context.Context) error) error {
	asked := ctx
	ctx, cancel := context.WithTimeout(ctx, c.retry.Budget)
	defer cancel()
	pause := c.retry.First
	for {
		err := f(ctx)
		if asked.Err() != nil {
			return asked.Err() // the caller gave up, and not the budget
		}
		if err == nil || !worthAnotherTry(err) {
			return err
		}
		// Full jitter keeps a thousand nodes that boot together apart.
		d := pause/2 + rand.N(pause/2+1)
		pause = min(2*pause, c.retry.Max)
		what := awaited(err)
		c.log.Warn("waiting for "+what+", trying again", "error", err, "in", d.Round(time.Millisecond))
		c.progress("waiting for "+what+": "+err.Error(), d)
		if waitErr := c.wait(ctx, d); waitErr != nil {
			if asked.Err() != nil {
				return asked.Err()
			}
			f := failure.Of(err)
			return failure.New(f.Class, fmt.Errorf("gave up after %s: %w", c.retry.Budget, err), f.Hint)
		}
	}
}

// awaited is which side has to change for the next try to end better.
func awaited(err error) string {
	switch {
	case failure.Of(err).Class == failure.NoDevice:
		return "this machine's evidence"
	case errors.Is(err, atls.ErrCertificateTime):
		return "this machine's clock, or another certificate of the key service"
	}
	return "the key service"
}

// worthAnotherTry says that the same call may end differently soon.
func worthAnotherTry(err error) bool {
	switch {
	case errors.Is(err, atls.ErrCertificateTime):
		return true // a clock that is not set yet makes a good certificate look expired
	case errors.Is(err, errLate):
		return true
	}
	return failure.Of(err).Class == failure.Unreachable
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
