package kubekms

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
)

// script is a source that gives one answer after the other, and the last one for ever.
// An answer is a KEK, or:
const (
	down  = "down"  // it cannot be reached
	gone  = "gone"  // it refuses
	hangs = "hangs" // it returns when its time is over
	stuck = "stuck" // it does not return even then, for three intervals
)

type script struct {
	t       testing.TB
	answers []string
	lease   time.Duration
	asked   int
}

func (s *script) Fetch(ctx context.Context) (*Keys, error) {
	a := s.answers[min(s.asked, len(s.answers)-1)]
	s.asked++
	switch a {
	case down:
		return nil, failure.Newf(failure.Unreachable, "", "the source is down")
	case gone:
		return nil, failure.Newf(failure.PolicyDenied, "", "the source refuses")
	case hangs:
		<-ctx.Done()
		return nil, failure.New(failure.Unreachable, ctx.Err(), "")
	case stuck:
		time.Sleep(3 * interval)
		return nil, failure.New(failure.Unreachable, ctx.Err(), "")
	}
	k, err := secret.From([]byte(a))
	if err != nil {
		return nil, err
	}
	keys := &Keys{Current: k}
	if s.lease != 0 {
		keys.Expires = time.Now().Add(s.lease)
	}
	return keys, nil
}

const (
	kekA     = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	kekB     = "BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB"
	kekC     = "CCCCCCCCCCCCCCCC"
	interval = 12 * time.Minute // of the default timeout
)

func idOf(t testing.TB, kek string) string {
	t.Helper()
	s := secretOf(t, kek)
	defer s.Close()
	id, err := KeyID(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// play runs a refresher over a script in a fake clock; look is called a second after
// each fetch is due, the first time before any refresh.
func play(t *testing.T, opts Options, s *script, look func(n int, r *Ring) (more bool)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s.t = t
		r, err := NewRefresher(t.Context(), s, opts)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		time.Sleep(time.Second)
		for n := 0; look(n, r.Ring()); n++ {
			time.Sleep(Interval(r.opts.Timeout))
		}
		cancel()
		if err := <-done; err != nil && !errors.Is(err, errStuck) {
			t.Error(err)
		}
		time.Sleep(4 * interval) // for a fetch that is stuck
		if h := r.Ring().Health(); h.State != Purged || h.Keys != 0 {
			t.Errorf("after the end: %+v", h)
		}
	})
}

// course runs a script of several fetches and writes down what requests see after
// each: the state, and which KEK encrypts.
func course(t *testing.T, opts Options, s *script, n int) string {
	t.Helper()
	names := map[string]string{idOf(t, kekA): "A", idOf(t, kekB): "B", idOf(t, kekC): "C", "": "-"}
	var out []string
	play(t, opts, s, func(i int, r *Ring) bool {
		h := r.Health()
		out = append(out, string(h.State)+" "+names[h.KeyID])
		return i < n
	})
	return strings.Join(out, ", ")
}

func TestTheCourseOfAnOutageAndOfARotation(t *testing.T) {
	for _, tt := range []struct {
		name    string
		answers []string
		opts    Options
		want    string
	}{
		{"four failures in a row and success", []string{kekA, down, down, down, down, kekA}, Options{},
			"serving A, failing A, failing A, failing A, failing A, serving A"},
		{"five failures purge, and success recovers", []string{kekA, down, down, down, down, down, down, kekA}, Options{},
			"serving A, failing A, failing A, failing A, failing A, purged -, purged -, serving A"},
		{"a success in between counts anew", []string{kekA, down, down, down, kekA, down, down, down, down, kekA}, Options{},
			"serving A, failing A, failing A, failing A, serving A, failing A, failing A, failing A, failing A, serving A"},
		{"another KEK after an outage", []string{kekA, down, down, down, down, down, kekB}, Options{},
			"serving A, failing A, failing A, failing A, failing A, purged -, serving B"},
		{"a KEK that changes", []string{kekA, kekB, kekB}, Options{},
			"serving A, serving A, serving B"},
		{"four observations", []string{kekA, kekB, kekB, kekB, kekB}, Options{Observations: 4},
			"serving A, serving A, serving A, serving A, serving B"},
		{"one observation", []string{kekA, kekB}, Options{Observations: 1},
			"serving A, serving B"},
		{"a key_id that flips and flops (case 44)", []string{kekA, kekB, kekA, kekB, kekA, kekB, kekA}, Options{},
			"serving A, serving A, serving A, serving A, serving A, serving A, serving A"},
		{"a failure between two observations", []string{kekA, kekB, down, kekB}, Options{},
			"serving A, serving A, failing A, serving B"},
		{"another KEK each time", []string{kekA, kekB, kekC, kekB, kekC, kekB, kekC}, Options{},
			"serving A, serving A, failing A, failing A, failing A, failing A, purged -"},
		{"a wrong length over a good KEK (case 44)", []string{kekA, "too short", kekA}, Options{},
			"serving A, failing A, serving A"},
		{"wrong lengths purge as failures do", []string{kekA, "x", "y", "z", "x", "y"}, Options{},
			"serving A, failing A, failing A, failing A, failing A, purged -"},
		{"coasting ends", []string{kekA, down}, Options{Outage: Coast, CoastFor: 2*interval + time.Minute},
			"serving A, failing A, failing A, failing A, failing A, coasting A, coasting A, coasting A, purged -"},
		{"coasting recovers", []string{kekA, down, down, down, down, down, down, kekA}, Options{Outage: Coast, CoastFor: 24 * time.Hour},
			"serving A, failing A, failing A, failing A, failing A, coasting A, coasting A, serving A"},
		{"a rotation while coasting", []string{kekA, down, down, down, down, down, kekB, kekB}, Options{Outage: Coast, CoastFor: 24 * time.Hour},
			"serving A, failing A, failing A, failing A, failing A, coasting A, serving A, serving B"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := course(t, tt.opts, &script{answers: tt.answers}, len(tt.answers)-1+boolInt(tt.answers[len(tt.answers)-1] == down)*7); got != tt.want {
				t.Errorf("\n got %s\nwant %s", got, tt.want)
			}
		})
	}
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestAHungCommandPurges: the daemon of 2018 waited for it without end (case 44).
func TestAHungCommandPurges(t *testing.T) {
	for _, how := range []string{hangs, stuck} {
		t.Run(how, func(t *testing.T) {
			play(t, Options{}, &script{answers: []string{kekA, how}}, func(n int, r *Ring) bool {
				h := r.Health()
				if n <= 4 && h.KeyID == "" {
					t.Errorf("purged after %d intervals", n)
				}
				// The fifth fetch begins at the timeout, and has less than an interval.
				if n == 6 && h.State != Purged {
					t.Errorf("after six intervals: %+v", h)
				}
				return n < 6
			})
		})
	}
}

func TestThePurgeIsToTheMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, err := NewRefresher(t.Context(), &script{answers: []string{kekA, down}}, Options{Outage: Coast, CoastFor: 7 * time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		state := func(after time.Duration) State {
			time.Sleep(after)
			synctest.Wait()
			return r.Ring().Health().State
		}
		if s := state(time.Hour - time.Second); s != Failing {
			t.Errorf("a second before the timeout: %s", s)
		}
		if s := state(2 * time.Second); s != Coasting {
			t.Errorf("a second after the timeout: %s", s)
		}
		if s := state(7*time.Minute - 2*time.Second); s != Coasting {
			t.Errorf("a second before the end of coasting: %s", s)
		}
		if s := state(2 * time.Second); s != Purged {
			t.Errorf("a second after it: %s", s)
		}
		cancel()
		<-done
	})
}

// TestALeaseEnds: a KEK that was leased is wiped at its end, whatever the failures.
func TestALeaseEnds(t *testing.T) {
	play(t, Options{Outage: Coast, CoastFor: 24 * time.Hour}, &script{answers: []string{kekA, kekA, down}, lease: 2*interval + time.Minute}, func(n int, r *Ring) bool {
		// Fetched last at one interval: the end is a minute after three of them.
		if h := r.Health(); (h.State == Purged) != (n > 3) {
			t.Errorf("after %d intervals: %+v", n, h)
		}
		return n < 5
	})
	synctest.Test(t, func(t *testing.T) {
		if _, err := NewRefresher(t.Context(), &script{answers: []string{kekA}, lease: -time.Second}, Options{}); err == nil {
			t.Error("a lease that is over is accepted")
		}
	})
}

func TestTheFirstFetchMustSucceed(t *testing.T) {
	for answer, class := range map[string]failure.Class{down: failure.Unreachable, gone: failure.PolicyDenied, hangs: failure.Unreachable, "wrong length": failure.Internal} {
		synctest.Test(t, func(t *testing.T) {
			_, err := NewRefresher(t.Context(), &script{answers: []string{answer}}, Options{})
			if failure.Of(err).Class != class || !strings.Contains(fmt.Sprint(err), "first fetch of the KEK") {
				t.Errorf("%s: %v", answer, err)
			}
		})
	}
}

func TestRequestsFailWithTheLastErrorsClass(t *testing.T) {
	play(t, Options{}, &script{answers: []string{kekA, down, down, down, down, down, gone}}, func(n int, r *Ring) bool {
		if n < 5 {
			return true
		}
		want := failure.Unreachable
		if n == 6 {
			want = failure.PolicyDenied
		}
		_, _, encErr := r.encrypt(purposeV2, []byte("x"))
		_, decErr := r.decrypt(purposeV2, make([]byte, 100), idOf(t, kekA))
		for _, err := range []error{encErr, decErr} {
			if failure.Of(err).Class != want || !errors.Is(err, ErrNoKey) {
				t.Errorf("after %d fetches: %v", n, err)
			}
		}
		return n < 6
	})
}

// TestOldKEKsAreWipedByTheirLease: a KEK that the source no longer returns decrypts for a while.
func TestOldKEKsAreWipedByTheirLease(t *testing.T) {
	var old []byte
	play(t, Options{KeepOld: 3 * interval}, &script{answers: []string{kekA, kekB}}, func(n int, r *Ring) bool {
		if n == 0 {
			var err error
			if old, _, err = r.encrypt(purposeV1, []byte("0123456789abcdef")); err != nil {
				t.Error(err)
			}
		}
		// Seen last at the start.
		_, err := r.decrypt(purposeV1, old, "")
		if gone := errors.Is(err, ErrUnknownKey); gone != (n >= 3) {
			t.Errorf("after %d fetches: %v", n, err)
		}
		return n < 4
	})
}

func TestARingHasABound(t *testing.T) {
	r := newRing(AESGCM, 4, time.Hour)
	give(t, r, kekA)
	for i := range 3 * maxKeys {
		give(t, r, kekA, fmt.Sprintf("%032d", i))
	}
	if h := r.Health(); h.Keys != maxKeys || h.KeyID != idOf(t, kekA) {
		t.Errorf("%+v", h)
	}
	if err := r.purge(errStuck); err != nil {
		t.Error(err)
	}
}

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	for name, o := range map[string]Options{
		"a short timeout":      {Timeout: time.Minute - 1},
		"no observation":       {Observations: -1},
		"five observations":    {Observations: 5},
		"coasting without end": {Outage: Coast},
		"an end of nothing":    {CoastFor: time.Hour},
		"another outage":       {Outage: "hope"},
		"a negative age":       {KeepOld: -1},
	} {
		s := &script{answers: []string{kekA}}
		if _, err := NewRefresher(t.Context(), s, o); failure.Of(err).Class != failure.Usage || s.asked != 0 {
			t.Errorf("%s: %v, asked %d times", name, err, s.asked)
		}
	}
}

// TestTheMachineHasNoHoles: every state is left by a success and nothing leaves
// Purged but that.
func TestTheMachineHasNoHoles(t *testing.T) {
	for _, s := range States {
		if s.after(succeeded) != Serving {
			t.Errorf("%s: a success leads to %s", s, s.after(succeeded))
		}
		for _, e := range []event{failed, gaveUp, coasts, expired} {
			if next := s.after(e); s == Purged && next != Purged || next == Serving && s != Serving {
				t.Errorf("%s, %s: %s", s, e, next)
			}
		}
	}
}
