package keyclient

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
)

var errDown = failure.New(failure.Unreachable, errors.New("down"), "")

// scripted is a link whose endpoints do as the functions say.
func scripted(connect ...func(context.Context) (*session, error)) (*link, *[]string) {
	var endpoints []*endpoint
	for i := range connect {
		endpoints = append(endpoints, &endpoint{address: fmt.Sprint("endpoint-", i)})
	}
	l := newLink(endpoints, func(string, time.Duration) {})
	var mu sync.Mutex
	var asked []string
	l.connect = func(ctx context.Context, e *endpoint) (*session, error) {
		mu.Lock()
		asked = append(asked, e.address)
		mu.Unlock()
		return connect[slices.Index(endpoints, e)](ctx)
	}
	return l, &asked
}

func down(context.Context) (*session, error) { return nil, errDown }

// silent accepts, and says nothing for as long as it is waited for.
func silent(ctx context.Context) (*session, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func good(address string) func(context.Context) (*session, error) {
	return func(context.Context) (*session, error) { return &session{address: address}, nil }
}

func answers(err error) func(context.Context) (*session, error) {
	return func(context.Context) (*session, error) { return nil, err }
}

func TestASilentFirstServerDelaysNobodyByMoreThanItsHeadStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := scripted(silent, silent, good("third"))
		began := time.Now()
		s, err := l.race(t.Context())
		if err != nil || s.address != "third" {
			t.Fatalf("%v, %v", s, err)
		}
		if took := time.Since(began); took != 2*headStart || took > 2*time.Second {
			t.Errorf("it took %s", took)
		}
		// Who answered is asked first the next time.
		began = time.Now()
		if _, err := l.race(t.Context()); err != nil || time.Since(began) != 0 {
			t.Errorf("%v after %s", err, time.Since(began))
		}
	})
}

func TestTheNextEndpointIsAskedAtOnceWhenOneFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, asked := scripted(down, good("second"), good("third"))
		began := time.Now()
		if s, err := l.race(t.Context()); err != nil || s.address != "second" || time.Since(began) != 0 {
			t.Fatalf("%v, %v after %s", s, err, time.Since(began))
		}
		if got := fmt.Sprint(*asked); got != "[endpoint-0 endpoint-1]" {
			t.Errorf("asked %s", got)
		}
	})
}

// A server that accepts connections and says nothing must not hold up another one that
// was down for a moment.
func TestASilentServerDoesNotHoldUpOneThatComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		l, asked := scripted(silent, func(context.Context) (*session, error) {
			if time.Since(began) < 7*time.Second {
				return nil, errDown
			}
			return &session{address: "second"}, nil
		})
		s, err := l.race(t.Context())
		if err != nil || s.address != "second" || time.Since(began) > 7*time.Second+longestPause {
			t.Fatalf("%v, %v after %s", s, err, time.Since(began))
		}
		if n := len(*asked); n > 6 {
			t.Errorf("%d attempts", n)
		}
	})
}

// Who gives up hears what each server did.
func TestACallerWhoGivesUpHearsOfEachServer(t *testing.T) {
	for want, second := range map[failure.Class]func(context.Context) (*session, error){
		failure.Unreachable:     down,
		failure.ServerUntrusted: answers(failure.New(failure.ServerUntrusted, errors.New("down"), "")),
	} {
		synctest.Test(t, func(t *testing.T) {
			l, _ := scripted(silent, second)
			ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
			defer cancel()
			_, _, err := l.session(ctx, 0)
			if failure.Of(err).Class != want || !errors.Is(err, context.DeadlineExceeded) ||
				!strings.Contains(err.Error(), "endpoint-0: no answer yet") || !strings.Contains(err.Error(), "endpoint-1: down") {
				t.Error(err)
			}
		})
	}
}

func TestARefusalIsAnAnswerAndPrefersItsEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := classify(&atls.Refusal{Class: atls.RefusedEvidence})
		l, _ := scripted(silent, answers(refused), good("third"))
		_, err := l.race(t.Context())
		if failure.Of(err).Class != failure.EvidenceRefused || l.preferred != 1 {
			t.Errorf("%v, preferred %d", err, l.preferred)
		}
	})
}

func TestAServerThatIsNotTrustedIsNamedBeforeOneThatIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := scripted(down, answers(classify(atls.ErrServerUntrusted)))
		_, err := l.race(t.Context())
		if failure.Of(err).Class != failure.ServerUntrusted {
			t.Fatal(err)
		}
		if !worthAnotherTry(err) {
			t.Error("one bad endpoint stops the retries of a good one")
		}
		l, _ = scripted(answers(classify(atls.ErrServerUntrusted)))
		if _, err := l.race(t.Context()); worthAnotherTry(err) {
			t.Error("a server that is not trusted is tried again")
		}
	})
}

func TestCallersShareOneAttemptAndLeaveItWhenTheyLike(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		l, asked := scripted(func(ctx context.Context) (*session, error) {
			select {
			case <-release:
				return &session{address: "only"}, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		})
		impatient, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if s, _, err := l.session(t.Context(), 0); err != nil || s.address != "only" {
					t.Errorf("%v, %v", s, err)
				}
			})
		}
		wg.Go(func() {
			if _, _, err := l.session(impatient, 0); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the impatient caller got %v", err)
			}
		})
		time.Sleep(2 * time.Second)
		close(release)
		wg.Wait()
		if len(*asked) != 1 {
			t.Errorf("%d attempts", len(*asked))
		}
		l.current = nil // it has no connection to be closed
	})
}

func TestAnAttemptEndsWithItsLastCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := scripted(silent)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := l.session(ctx, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		synctest.Wait()
		if l.flight != nil {
			t.Error("the attempt goes on")
		}
	})
}

// An attempt that was told to end takes a moment to hear it. Who comes in that moment
// asked for a session as much as anybody, and gets one.
func TestACallerWhoJoinsADesertedAttemptGetsAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		attempts := 0
		l, _ := scripted(func(ctx context.Context) (*session, error) {
			if attempts++; attempts > 1 {
				return &session{address: "only"}, nil
			}
			<-ctx.Done()
			time.Sleep(time.Second) // a TPM finishes its command
			return nil, ctx.Err()
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := l.session(ctx, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		if s, _, err := l.session(t.Context(), 0); err != nil || s.address != "only" {
			t.Errorf("%v, %v", s, err)
		}
		l.current = nil // it has no connection to be closed
	})
}

// A machine that measured a volume fits another profile than it did when the session
// began. A session of now that is denied is the key service's last word, and nothing
// ends the session, which a first format of another volume may need.
func TestADenialIsHeardAgainWithEvidenceOfThisMoment(t *testing.T) {
	denied := failure.New(failure.PolicyDenied, errors.New("no grant"), "")
	for _, tt := range []struct {
		name         string
		given        bool // to a session that was attested again
		calls, again int
	}{{"fits another profile by now", true, 2, 1}, {"fits none", false, 2, 1}} {
		l, asked := scripted(good("first"))
		l.holds = func(_ *session, left time.Duration) bool { return left < 24*time.Hour }
		again := 0
		l.renew = func(context.Context, *session) error { again++; return nil }
		if err := l.call(t.Context(), func(context.Context, *session) error { return nil }); err != nil {
			t.Fatal(err)
		}
		was, calls := l.current, 0
		err := l.call(t.Context(), func(context.Context, *session) error {
			if calls++; again > 0 && tt.given {
				return nil
			}
			return denied
		})
		if (err == nil) != tt.given || err != nil && failure.Of(err).Class != failure.PolicyDenied {
			t.Errorf("%s: %v", tt.name, err)
		}
		if calls != tt.calls || again != tt.again || len(*asked) != 1 || l.current != was {
			t.Errorf("%s: %d calls, attested again %d times, connected %v, the session stays: %v", tt.name, calls, again, *asked, l.current == was)
		}
		l.current = nil // it has no connection to be closed
	}
}

// Case 106: who cuts the network right after a refusal does not take it back.
func TestARefusalIsNotLostWithTheNetwork(t *testing.T) {
	denied := failure.New(failure.PolicyDenied, errors.New("no grant"), "")
	cut := false
	l, _ := scripted(func(ctx context.Context) (*session, error) {
		if cut {
			return nil, errDown
		}
		return connected(t), nil
	})
	l.holds = func(_ *session, left time.Duration) bool { return left < 24*time.Hour }
	l.renew = func(context.Context, *session) error { return errDown }
	if err := l.call(t.Context(), func(context.Context, *session) error { return nil }); err != nil {
		t.Fatal(err)
	}
	cut = true
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	err := l.call(ctx, func(context.Context, *session) error { return denied })
	if failure.Of(err).Class != failure.PolicyDenied {
		t.Errorf("got %v", err)
	}
}

// connected is a session that can be closed.
func connected(t *testing.T) *session {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///nobody", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	return &session{conn: conn}
}

// TestTheSessionOfKeysEndsWithTheLastKey: who keeps a recording of it and later reads
// this machine's memory must not find what opens it.
func TestTheSessionOfKeysEndsWithTheLastKey(t *testing.T) {
	l, asked := scripted(good("first"))
	dummy := func() *grpc.ClientConn {
		c, err := grpc.NewClient("passthrough:///nowhere", grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	l.connect = func(_ context.Context, e *endpoint) (*session, error) {
		*asked = append(*asked, e.address)
		return &session{address: e.address, conn: dummy()}, nil
	}
	l.enter()
	l.enter()
	if _, _, err := l.session(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if l.leave() || l.current == nil {
		t.Error("the session ended with one of two keys")
	}
	if !l.leave() || l.current != nil {
		t.Error("the session outlives the last key")
	}
}

// A machine that shuts down is refused, and gives its leases back on the session that it
// has: looking after that session must not end it.
func TestAKeptSessionOutlivesARefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := classify(&atls.Refusal{Class: atls.RefusedEvidence})
		attempt := good("first")
		l, asked := scripted(func(ctx context.Context) (*session, error) { return attempt(ctx) })
		l.holds = func(_ *session, left time.Duration) bool { return left < time.Minute }
		l.renew = func(context.Context, *session) error {
			t.Error("it was attested anew on the same connection")
			return nil
		}
		if err := l.keep(t.Context(), time.Second); err != nil || l.current == nil {
			t.Fatal(err)
		}
		first := l.current
		if err := l.keep(t.Context(), time.Second); err != nil || len(*asked) != 1 {
			t.Errorf("a session that holds: %v, asked %d times", err, len(*asked))
		}
		attempt = answers(refused)
		if err := l.keep(t.Context(), time.Hour); failure.Of(err).Class != failure.EvidenceRefused || l.current != first {
			t.Errorf("%v, and the session stays: %v", err, l.current == first)
		}
		attempt = good("second")
		if err := l.keep(t.Context(), time.Hour); err != nil || l.current == first {
			t.Errorf("%v, and another session: %v", err, l.current != first)
		}
		l.current = nil // it has no connection to be closed
	})
}
