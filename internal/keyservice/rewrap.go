package keyservice

import (
	"context"
	"errors"
	"time"

	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/kms"
)

// Rewrap wraps every key that is not under the KEK in force again under that one.
// The MAC key comes last, so that as long as anything is under an older KEK it is
// too. It may be ended at any point and run again.
func (a *Admin) Rewrap(ctx context.Context, report func(macstore.Progress)) (macstore.Progress, error) {
	return rewrap(ctx, a.kms, a.records, a.now, report)
}

func rewrap(ctx context.Context, k kms.KMS, records *macstore.Store, now func() time.Time, report func(macstore.Progress)) (macstore.Progress, error) {
	current, err := kms.Current(ctx, k)
	if err != nil {
		return macstore.Progress{}, forOperator(err)
	}
	again := macstore.Rewrap(k, current)
	var sum macstore.Progress
	var refused error
	for _, kind := range macstore.Collections {
		before := sum
		p, err := records.Walk(ctx, kind, visits(now)[kind], again, func(p macstore.Progress) {
			if report != nil {
				report(before.Plus(p))
			}
		})
		sum = sum.Plus(p)
		refused = errors.Join(refused, err)
		// An object that is no record of ours opens under no KEK: anyone who writes
		// the storage must not hold up a change of the KEK by leaving one there.
		if errors.Is(err, macstore.ErrIncomplete) {
			return sum, forOperator(refused)
		}
	}
	return sum, forOperator(errors.Join(records.RewrapMACKey(ctx, k), refused))
}

// rewrapLoop re-wraps at intervals until ctx ends. The first run waits as well: while
// replicas are restarted one after the other, those that are not yet must still
// open what the first one finds. It does not wait for longer than ten minutes, so that
// a service that is restarted each day runs it at all. A run that fails is tried
// again at its next time; the keys stay as they are, and open.
func (s *Service) rewrapLoop(ctx context.Context, every time.Duration) {
	timer := time.NewTimer(min(every, 10*time.Minute))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		p, err := rewrap(ctx, s.kms, s.records, s.now, s.metrics.rewrapped)
		s.metrics.rewrapped(p)
		s.forget.used()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			s.log.ErrorContext(ctx, "re-wrap did not finish, it goes on at its next time", "done", p.Done, "total", p.Total, "changed", p.Changed, "failed", p.Failed, "error", err)
		case p.Changed > 0:
			s.log.InfoContext(ctx, "re-wrap finished", "total", p.Total, "changed", p.Changed)
		}
		timer.Reset(every)
	}
}
