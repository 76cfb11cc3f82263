package keyclient

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
)

// headStart is how much later than the one before it an endpoint is tried, as in
// RFC 8305: a server that accepts connections and says nothing delays nobody by
// more than this.
const headStart = 500 * time.Millisecond

// link is the way to the key service: one session with one of its endpoints, which
// every caller shares. Callers that need a session at the same time wait for one
// attempt, each for as long as it likes.
type link struct {
	endpoints []*endpoint
	progress  Progress
	connect   func(context.Context, *endpoint) (*session, error)
	holds     func(*session, time.Duration) bool // its verdict, for that much longer
	renew     func(context.Context, *session) error
	after     func(time.Duration) <-chan time.Time

	mu        sync.Mutex
	preferred int // the endpoint that answered last
	current   *session
	users     int // calls that use, or will use, the session
	flight    *flight
}

// flight is an attempt to get a session that is under way.
type flight struct {
	done     chan struct{}
	waiting  int
	deserted bool // every caller left at some moment, and it was told to end
	cancel   context.CancelFunc
	session  *session
	err      error
}

func newLink(endpoints []*endpoint, progress Progress) *link {
	return &link{endpoints: endpoints, progress: progress, after: time.After,
		holds:   (*session).fresh,
		renew:   func(ctx context.Context, s *session) error { return s.renew(ctx) },
		connect: func(ctx context.Context, e *endpoint) (*session, error) { return e.connect(ctx) }}
}

// session returns an attested session whose verdict holds for that much longer, or is
// of this moment, which it says.
func (l *link) session(ctx context.Context, left time.Duration) (s *session, fresh bool, err error) {
	for {
		l.mu.Lock()
		if s := l.current; s != nil && l.holds(s, left) {
			l.mu.Unlock()
			return s, false, nil
		}
		f := l.flight
		if f == nil {
			f = l.start()
		}
		f.waiting++
		l.mu.Unlock()
		select {
		case <-f.done:
			if f.err != nil && f.deserted {
				continue // it was ended for others' sake, before this caller came
			}
			return f.session, true, f.err
		case <-ctx.Done():
			l.mu.Lock()
			defer l.mu.Unlock()
			if f.waiting--; f.waiting == 0 {
				f.deserted = true
				f.cancel()
			}
			return nil, false, ctx.Err()
		}
	}
}

// start begins an attempt. The lock is held. The attempt belongs to no caller: it
// ends when it has a result, or when the last caller left.
func (l *link) start() *flight {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout+2*atls.DefaultTimeout)
	f := &flight{done: make(chan struct{}), cancel: cancel}
	l.flight = f
	old := l.current
	go func() {
		defer cancel()
		s, err := l.refresh(ctx, old)
		l.mu.Lock()
		defer l.mu.Unlock()
		if err == nil && f.waiting == 0 && s != old {
			s.close()
			s, err = nil, context.Canceled
		}
		f.session, f.err = s, err
		if l.current != s {
			l.drop()
			l.current = s
		}
		l.flight = nil
		close(f.done)
	}()
	return f
}

// refresh renews the session that there is, else it makes another one.
func (l *link) refresh(ctx context.Context, old *session) (*session, error) {
	if old != nil && l.renew(ctx, old) == nil {
		return old, nil
	}
	return l.race(ctx)
}

type outcome struct {
	n       int
	session *session
	err     error
}

// race tries the endpoints beside each other, the preferred one first and each of
// the others a little later, or as soon as one before it has failed. The first
// session wins; so does the first answer, which is the key service's decision
// whichever endpoint gives it.
func (l *link) race(ctx context.Context) (*session, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l.mu.Lock()
	first := l.preferred
	l.mu.Unlock()
	results := make(chan outcome)
	started, ended := 0, 0
	next := func() {
		n := (first + started) % len(l.endpoints)
		started++
		l.progress("asking the key service "+l.endpoints[n].address, dialTimeout+atls.DefaultTimeout)
		go func() {
			s, err := l.connect(ctx, l.endpoints[n])
			results <- outcome{n, s, err}
		}()
	}
	next()
	var errs []error
	for {
		var timer <-chan time.Time
		if started < len(l.endpoints) {
			timer = l.after(headStart)
		}
		select {
		case <-timer:
			next()
			continue
		case r := <-results:
			ended++
			if r.err == nil || isAnswer(r.err) && !errors.Is(r.err, context.Canceled) {
				l.prefer(r.n)
				go sweep(results, started-ended)
				if r.err != nil {
					r.err = withContext(r.err, l.endpoints[r.n].address)
				}
				return r.session, r.err
			}
			errs = append(errs, withContext(r.err, l.endpoints[r.n].address))
		}
		switch {
		case started < len(l.endpoints):
			next()
		case ended == started:
			return nil, retryable(errs)
		}
	}
}

// sweep closes the sessions of those that lost the race.
func sweep(results <-chan outcome, n int) {
	for range n {
		if r := <-results; r.session != nil {
			r.session.close()
		}
	}
}

// retryable is the worst error, and one that is worth another try if that of any
// endpoint is: another round may give another result.
func retryable(errs []error) error {
	err := worst(errs)
	if worthAnotherTry(err) {
		return err
	}
	for _, other := range errs {
		if worthAnotherTry(other) {
			f := failure.Of(err)
			return &failure.Error{Class: f.Class, CorrelationID: f.CorrelationID, Hint: f.Hint, Err: errors.Join(err, errLate)}
		}
	}
	return err
}

func (l *link) prefer(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.preferred = n
}

// drop ends the session. The lock is held.
func (l *link) drop() {
	if l.current != nil {
		l.current.close()
		l.current = nil
	}
}

// forget ends a session that failed.
func (l *link) forget(s *session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.current == s {
		l.drop()
	}
}

// enter counts a user of the link; leave ends the session with the last one.
func (l *link) enter() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.users++
}

func (l *link) leave() (last bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.users--
	if l.users == 0 {
		l.drop()
	}
	return l.users == 0
}

// call runs f in a session. An error that says nothing of the key service's
// decision ends the session, and so does a refusal of its evidence: the policy
// may have changed since, and evidence of this moment may fit it. So it may where the
// policy denies something: this machine may have measured a volume since. The session
// is attested again then, and goes on for those who need it.
func (l *link) call(ctx context.Context, f func(context.Context, *session) error) error {
	return l.callWith(ctx, 0, f)
}

// callWith is call in a session whose verdict holds for that much longer, if any
// verdict does.
func (l *link) callWith(ctx context.Context, left time.Duration, f func(context.Context, *session) error) error {
	for {
		s, fresh, err := l.session(ctx, left)
		if err != nil {
			return classify(err)
		}
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		err = classify(f(callCtx, s))
		cancel()
		if err == nil {
			return nil
		}
		class := failure.Of(err).Class
		if class == failure.EvidenceRefused || !isAnswer(err) {
			l.forget(s)
		}
		if class != failure.EvidenceRefused && class != failure.PolicyDenied || fresh {
			return withContext(err, s.address)
		}
		if class == failure.PolicyDenied {
			left = longerThanAnyVerdict
		}
	}
}

// longerThanAnyVerdict has a session attested again whatever its verdict.
const longerThanAnyVerdict = 48 * time.Hour

// close ends the link.
func (l *link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drop()
}
