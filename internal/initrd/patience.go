package initrd

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
)

// Patience tries again what may change by itself. Nobody sits at the console of a
// confidential VM, and a boot that gives up has to be switched on again by hand; but a
// machine that was refused has nothing to wait for.
type Patience struct {
	Pause time.Duration // between two attempts
	// Appear is how long disks, a TPM and what has no class may take to come.
	Appear time.Duration
	Out    io.Writer // what is waited for, for people
}

// Default is what the initrd uses.
var Default = Patience{Pause: 10 * time.Second, Appear: 5 * time.Minute}

// Run calls attempt until it succeeds or its failure is final, and returns that.
func (p Patience) Run(ctx context.Context, attempt func(context.Context) error) error {
	started := time.Now()
	for n := 1; ; n++ {
		err := attempt(ctx)
		if err == nil {
			return nil
		}
		again, limit := mayPass(failure.Of(err).Class)
		if !again || limit && time.Since(started)+p.Pause > p.Appear {
			return err
		}
		text, _ := failure.Describe(err)
		fmt.Fprintf(p.Out, "keyagent: attempt %d: %s%s; again in %s\n", n, text, idOf(err), p.Pause)
		t := time.NewTimer(p.Pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return err
		case <-t.C:
		}
	}
}

// mayPass says whether a failure may pass by itself, and whether that has a limit.
func mayPass(c failure.Class) (again, limit bool) {
	switch c {
	case failure.Unreachable, failure.Held: // the service comes back, the other node ends
		return true, false
	case failure.NotFound, failure.NoDevice, failure.DeviceBusy, failure.Internal:
		return true, true
	}
	return false, false
}

func idOf(err error) string {
	if id := failure.Of(err).CorrelationID; id != "" {
		return " (correlation id " + id + ")"
	}
	return ""
}
