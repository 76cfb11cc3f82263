package kubekms

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
)

// The parts of the daemon of 2018's contract.
const (
	DefaultTimeout = time.Hour
	MinTimeout     = time.Minute
	// refreshes is how many there are in a timeout.
	refreshes = 5
	// maxFailures in a row are too many.
	maxFailures = 5
)

// The other defaults of [Options].
const (
	DefaultObservations = 2
	// maxObservations: the KEK in force is not confirmed while another one waits,
	// and may not be used for longer than the timeout.
	maxObservations = 4
	DefaultKeepOld  = 24 * time.Hour
)

// Outage is what happens after too many failures in a row.
type Outage string

// The two.
const (
	Fail  Outage = "fail"  // wipe the KEKs; requests fail
	Coast Outage = "coast" // use them for a stated time more, and say so
)

// KeepNone drops a KEK as soon as the source no longer returns it.
const KeepNone = time.Duration(math.MinInt64)

// Typed is what flags say, where zero is a word of its own and not the default.
func Typed(o Options) (Options, error) {
	switch {
	case o.Timeout == 0:
		return o, failure.Newf(failure.Usage, "", "a timeout of 0s is too short, the shortest is %s", MinTimeout)
	case o.Observations == 0:
		return o, failure.Newf(failure.Usage, "", "0 observations: allowed are 1 to %d", maxObservations)
	case o.KeepOld < 0:
		return o, failure.Newf(failure.Usage, "", "old KEKs cannot be kept for %s", o.KeepOld)
	case o.KeepOld == 0:
		o.KeepOld = KeepNone
	}
	return o, o.Check()
}

// Options configure a [Refresher]. The zero value of each is its default.
type Options struct {
	Mode         Mode          // default AESGCM
	Timeout      time.Duration // how long a KEK is used without a refresh
	Observations int           // of another KEK in a row, until it encrypts
	KeepOld      time.Duration // how long to keep decrypting with a KEK the source no longer returns; or KeepNone
	Outage       Outage        // default Fail
	CoastFor     time.Duration // goes with Coast, which needs it
	Log          *slog.Logger  // default none
	Metrics      *Metrics      // default none
}

// Check sets the defaults, and refuses what makes no sense.
func (o *Options) Check() error {
	if o.Mode == "" {
		o.Mode = AESGCM
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Observations == 0 {
		o.Observations = DefaultObservations
	}
	if o.KeepOld == 0 {
		o.KeepOld = DefaultKeepOld
	}
	if o.Outage == "" {
		o.Outage = Fail
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case o.Timeout < MinTimeout:
		return failure.Newf(failure.Usage, "", "a timeout of %s is too short, the shortest is %s", o.Timeout, MinTimeout)
	case o.Observations < 1 || o.Observations > maxObservations:
		return failure.Newf(failure.Usage, "", "%d observations: allowed are 1 to %d", o.Observations, maxObservations)
	case o.KeepOld < 0 && o.KeepOld != KeepNone:
		return failure.Newf(failure.Usage, "", "old KEKs cannot be kept for %s", o.KeepOld)
	case o.Outage != Fail && o.Outage != Coast:
		return failure.Newf(failure.Usage, "fail or coast", "unknown way %q to treat an outage", o.Outage)
	case o.Outage == Coast && o.CoastFor <= 0:
		return failure.Newf(failure.Usage, "--coast-for DURATION says for how long", "coasting needs an end")
	case o.Outage == Fail && o.CoastFor != 0:
		return failure.Newf(failure.Usage, "--outage coast", "a time to coast is given, and no coasting is asked for")
	}
	return nil
}

// Interval is how often the source of a timeout is asked.
func Interval(timeout time.Duration) time.Duration { return timeout / refreshes }

// Refresher keeps a ring fresh.
type Refresher struct {
	opts    Options
	source  Source
	ring    *Ring
	results chan result

	// Of the goroutine that runs Run.
	state     State
	failures  int  // in a row
	inFlight  bool // a fetch
	abandoned bool // it was counted as a failure already
	lease     time.Time
	early     time.Time // when to fetch, so that the lease does not end before the next refresh
	begun     time.Time // the fetch under way
	bound     time.Duration
	coastEnd  time.Time
}

type result struct {
	keys *Keys
	err  error
}

// NewRefresher fetches for the first time, which must succeed.
func NewRefresher(ctx context.Context, source Source, opts Options) (*Refresher, error) {
	if err := opts.Check(); err != nil {
		return nil, err
	}
	r := &Refresher{opts: opts, source: source, ring: newRing(opts.Mode, opts.Observations, max(0, opts.KeepOld)),
		results: make(chan result, 1), state: Starting}
	ctx, cancel := context.WithTimeout(ctx, r.limit())
	defer cancel()
	keys, err := source.Fetch(ctx)
	if err == nil {
		err = r.accept(keys)
	}
	if err != nil {
		f := failure.Of(err)
		return nil, failure.New(f.Class, fmt.Errorf("first fetch of the KEK: %w", err), f.Hint)
	}
	return r, nil
}

// Ring returns the KEKs, for requests.
func (r *Refresher) Ring() *Ring { return r.ring }

// limit bounds one fetch, so that its failure is known before the next is due, and
// in time for another one before a lease ends.
func (r *Refresher) limit() time.Duration {
	i := Interval(r.opts.Timeout)
	limit := i - i/10
	left := time.Until(r.lease)
	if r.lease.IsZero() || left <= 0 {
		return limit
	}
	return min(limit, max(left/2, min(left, shortFetch)))
}

const (
	// shortFetch is what a fetch may take however short the lease is.
	shortFetch = 10 * time.Second
	// shortPause is between two fetches that a lease asks for.
	shortPause = time.Second
)

// plan sets the next fetch that the lease asks for: when a third of what is left of it
// remains. Failures in a row come closer to each other, up to its end.
func (r *Refresher) plan() {
	r.early = time.Time{}
	if left := time.Until(r.lease); !r.lease.IsZero() && left > shortPause {
		r.early = time.Now().Add(max(shortPause, left-left/3))
	}
}

// Run refreshes until ctx ends, then wipes the KEKs. Call it once.
func (r *Refresher) Run(ctx context.Context) error {
	tick := time.NewTicker(Interval(r.opts.Timeout))
	defer tick.Stop()
	expiry := time.NewTimer(0)
	defer expiry.Stop()
	late := time.NewTimer(0)
	late.Stop()
	defer late.Stop()
	early := time.NewTimer(0)
	early.Stop()
	defer early.Stop()
	cancel := func() {} // of the fetch under way
	defer func() { cancel() }()
	begin := func() {
		cancel()
		r.begun, r.bound = time.Now(), r.limit()
		late.Reset(r.bound + Interval(r.opts.Timeout)/20)
		var fetching context.Context
		fetching, cancel = context.WithTimeout(ctx, r.bound)
		r.inFlight, r.abandoned = true, false
		go r.fetch(fetching)
	}
	for {
		r.setExpiry(expiry)
		if early.Stop(); !r.early.IsZero() && !r.inFlight {
			early.Reset(max(0, time.Until(r.early)))
		}
		select {
		case <-ctx.Done():
			cancel()
			return errors.Join(r.drain(), r.ring.purge(failure.Newf(failure.State, "", "it was stopped")))
		case <-tick.C:
			switch {
			case !r.inFlight:
				begin()
			case time.Since(r.begun) > r.bound:
				r.abandon() // again: this refresh does not take place
			}
		case <-early.C:
			begin()
		case <-late.C:
			if r.inFlight {
				r.abandon()
			}
		case res := <-r.results:
			r.inFlight = false
			late.Stop()
			switch {
			case res.err == nil:
				if err := r.accept(res.keys); err != nil {
					r.fail(err)
				}
			case ctx.Err() == nil && !r.abandoned:
				r.fail(res.err)
			}
		case <-expiry.C:
			r.expire()
		}
	}
}

// abandon counts a fetch that does not return although its time is over. A success
// that comes late is welcome; a failure was counted here.
func (r *Refresher) abandon() {
	r.abandoned = true
	r.fail(errStuck)
}

var errStuck = failure.Newf(failure.Unreachable, "", "the key source does not return")

// fetch sends exactly one result, which the channel has room for.
func (r *Refresher) fetch(ctx context.Context) {
	began := time.Now()
	keys, err := r.source.Fetch(ctx)
	r.opts.Metrics.fetched(err, time.Since(began))
	r.results <- result{keys, err}
}

// drain waits for a fetch under way, which was cancelled, and wipes what it brings.
func (r *Refresher) drain() error {
	if !r.inFlight {
		return nil
	}
	t := time.NewTimer(5 * time.Second)
	defer t.Stop()
	select {
	case res := <-r.results:
		if res.err == nil {
			return res.keys.Close()
		}
		return nil
	case <-t.C:
		return errStuck
	}
}

// setExpiry sets the timer to the earliest end that there is.
func (r *Refresher) setExpiry(t *time.Timer) {
	t.Stop()
	end := r.lease
	if r.state == Coasting && (end.IsZero() || r.coastEnd.Before(end)) {
		end = r.coastEnd
	}
	if !end.IsZero() && r.state != Purged {
		t.Reset(max(0, time.Until(end)))
	}
}

// accept takes over keys.
func (r *Refresher) accept(keys *Keys) error {
	now := time.Now()
	lease := keys.Expires
	if !lease.IsZero() && !lease.After(now) {
		return errors.Join(failure.Newf(failure.Unreachable, "", "the lease of the KEK is over already"), keys.Close())
	}
	before := r.ring.Health()
	promoted, err := r.ring.accept(keys, now)
	if err != nil {
		return err
	}
	r.failures, r.lease = 0, lease
	r.plan()
	r.state = r.state.after(succeeded)
	after := r.ring.Health()
	switch id, count := r.ring.pendingKey(); {
	case promoted:
		r.opts.Log.Info("this KEK encrypts from now on", "key_id", after.KeyID, "before", before.KeyID, "keys", after.Keys)
	case id != "":
		r.opts.Log.Info("the key source gives another KEK, which waits for its promotion", "key_id", id, "observations", count, "needed", r.opts.Observations)
	}
	if before.State != after.State {
		r.opts.Log.Info("the key source answers", "state", after.State, "key_id", after.KeyID)
	}
	return nil
}

// fail counts a failure. The keys stay as they are until too many in a row.
func (r *Refresher) fail(err error) {
	r.failures++
	r.plan()
	r.opts.Log.Error("the key source gives no KEK", "error", err, "class", failure.Of(err).Class, "in_a_row", r.failures, "state", r.state)
	r.state = r.state.after(failed)
	if r.failures >= maxFailures {
		if r.opts.Outage == Coast {
			if r.state == Failing {
				r.coastEnd = time.Now().Add(r.opts.CoastFor)
				r.opts.Log.Error("coasting: the KEKs are used without the key source", "until", r.coastEnd)
			}
			r.state = r.state.after(coasts)
		} else if next := r.state.after(gaveUp); next != r.state {
			r.wipe(next, err)
			return
		}
	}
	r.ring.mark(r.state, err)
}

// expire ends what a lease or coasting allowed.
func (r *Refresher) expire() {
	if next := r.state.after(expired); next != r.state {
		err := r.ring.Health().Err
		if err == nil {
			err = failure.Newf(failure.Unreachable, "", "the lease of the KEK is over")
		}
		r.wipe(next, err)
	}
}

func (r *Refresher) wipe(next State, err error) {
	r.state, r.lease, r.early, r.coastEnd = next, time.Time{}, time.Time{}, time.Time{}
	if wipeErr := r.ring.purge(err); wipeErr != nil {
		r.opts.Log.Error("wiping the KEKs", "error", wipeErr)
	}
	r.opts.Metrics.purged()
	r.opts.Log.Error("the KEKs are wiped: requests fail until the key source answers", "class", failure.Of(err).Class)
}
