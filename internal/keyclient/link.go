package keyclient

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
)

// headStart is how much later than the one before it an endpoint is tried, as in
// RFC 8305: a server that accepts connections and says nothing delays nobody by
// more than this.
const headStart = 500 * time.Millisecond

// longestPause is between two attempts at an endpoint that failed, while another one has
// not answered yet.
const longestPause = 5 * time.Second

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
	soFar     error // what an attempt that is under way has come to
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
			if errors.Is(ctx.Err(), context.DeadlineExceeded) && l.soFar != nil {
				return nil, false, l.soFar
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
	l.flight, l.soFar = f, nil
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

// keep makes another session if the one that there is does not hold for that much longer,
// and leaves that one if it cannot: to attest anew on it would end it with a refusal. What
// is under way on the old one has the time to end.
func (l *link) keep(ctx context.Context, left time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout+2*atls.DefaultTimeout)
	defer cancel()
	l.mu.Lock()
	enough := l.flight != nil || l.current != nil && l.holds(l.current, left)
	l.mu.Unlock()
	if enough {
		return nil
	}
	s, err := l.race(ctx)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.flight != nil { // somebody needed one meanwhile, and gets it
		s.close()
		return nil
	}
	if old := l.current; old != nil {
		time.AfterFunc(callTimeout, old.close)
	}
	l.current = s
	return nil
}

// refresh renews the session that there is, else it makes another one.
func (l *link) refresh(ctx context.Context, old *session) (*session, error) {
	if old == nil {
		return l.race(ctx)
	}
	refusal := l.renew(ctx, old)
	if refusal == nil {
		return old, nil
	}
	s, err := l.race(ctx)
	if err != nil && failure.Of(classify(refusal)).Class == failure.EvidenceRefused {
		err = lasting(classify(refusal), err)
	}
	return s, err
}

type outcome struct {
	n       int
	session *session
	err     error
}

// race tries the endpoints beside each other, the preferred one first and each of
// the others a little later, or as soon as one before it has failed. The first
// session wins; so does the first answer, which is the key service's decision
// whichever endpoint gives it. While one has not answered yet, those that failed are
// asked again: a server that says nothing must not hold up another that comes back, and
// one that is slow keeps its place.
func (l *link) race(ctx context.Context) (*session, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l.mu.Lock()
	first := l.preferred
	l.mu.Unlock()
	results := make(chan outcome)
	last := make([]error, len(l.endpoints)) // of each endpoint that is not being asked
	started, pending := 0, 0
	ask := func(n int) {
		pending++
		last[n] = nil
		l.progress("asking the key service "+l.endpoints[n].address, dialTimeout+atls.DefaultTimeout)
		go func() {
			s, err := l.connect(ctx, l.endpoints[n])
			results <- outcome{n, s, err}
		}()
	}
	next := func() {
		started++
		ask((first + started - 1) % len(l.endpoints))
	}
	next()
	pause := headStart
	for {
		pause = min(2*pause, longestPause)
		l.say(last)
		var timer <-chan time.Time
		if started < len(l.endpoints) {
			timer = l.after(headStart)
		} else if pending < started {
			timer = l.after(pause)
		}
		select {
		case <-timer:
			if started < len(l.endpoints) {
				next()
				continue
			}
			for n, err := range last {
				if err != nil && worthAnotherTry(err) {
					ask(n)
				}
			}
			continue
		case r := <-results:
			pending--
			if r.err == nil || isAnswer(r.err) && !errors.Is(r.err, context.Canceled) {
				l.prefer(r.n)
				go sweep(results, pending)
				if r.err != nil {
					r.err = withContext(r.err, l.endpoints[r.n].address)
				}
				return r.session, r.err
			}
			last[r.n] = withContext(r.err, l.endpoints[r.n].address)
		}
		switch {
		case started < len(l.endpoints):
			next()
		case pending == 0:
			return nil, retryable(last)
		}
	}
}

// say keeps what an attempt has come to so far, for those who leave it: what each
// endpoint did, under the class of the worst.
func (l *link) say(last []error) {
	var all []error
	var text []string
	for n, err := range last {
		if err == nil {
			err = failure.New(failure.Unreachable, errors.New("no answer yet"), "is the key service running, and does this network reach it?")
			err = withContext(err, l.endpoints[n].address)
		}
		all, text = append(all, err), append(text, err.Error())
	}
	f := failure.Of(worst(all))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.soFar = failure.New(f.Class, fmt.Errorf("%s: %w", strings.Join(text, "; "), context.DeadlineExceeded), f.Hint)
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
	var refusal error // on a session whose evidence may be what is refused
	for {
		s, fresh, err := l.session(ctx, left)
		if err != nil {
			return lasting(refusal, classify(err))
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
			return withContext(lasting(refusal, err), s.address)
		}
		refusal = err
		if class == failure.PolicyDenied {
			left = longerThanAnyVerdict
		}
	}
}

// lasting is what a refusal comes to that was to be tried with fresh evidence: it stands if that
// had no answer, so that who cuts the network right after it does not take it back.
func lasting(refusal, err error) error {
	if refusal != nil && !isAnswer(err) {
		return errors.Join(refusal, err)
	}
	return err
}

// longerThanAnyVerdict has a session attested again whatever its verdict.
const longerThanAnyVerdict = 48 * time.Hour

// close ends the link.
func (l *link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drop()
}
