package kubekms

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
)

// verdicts is a key service whose verdicts on this machine end, with the client's rule
// for when to renew one.
type verdicts struct {
	released
	lifetime time.Duration
	takes    time.Duration // an attestation
	expires  time.Time
	fails    func(n int) bool
	asked    int
}

func (v *verdicts) GetKey(ctx context.Context, q keyclient.Request) (*keyclient.Key, error) {
	v.asked++
	if v.fails != nil && v.fails(v.asked) {
		<-ctx.Done()
		return nil, failure.New(failure.Unreachable, ctx.Err(), "")
	}
	if time.Until(v.expires) <= max(q.Left, 30*time.Second) {
		time.Sleep(v.takes)
		v.expires = time.Now().Add(v.lifetime)
	}
	k, err := v.released.GetKey(ctx, q)
	if k != nil {
		k.Expires = v.expires
	}
	return k, err
}

// withoutKEK runs a plugin for hours, and returns for how many seconds requests fail.
func withoutKEK(t *testing.T, v *verdicts, timeout, hours time.Duration) (seconds int) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		v.dek = kekA
		a := &Attested{Keys: v, Volume: "etcd-kek", Left: Lease(timeout)}
		if err := a.Init(t.Context()); err != nil {
			t.Fatal(err)
		}
		r, err := NewRefresher(t.Context(), a, Options{Timeout: timeout})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		for end := time.Now().Add(hours); time.Now().Before(end); time.Sleep(time.Second) {
			if r.Ring().Health().Keys == 0 {
				seconds++
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return seconds
}

// Case 84: a KEK whose lease ends sooner than the next refresh is due. As long as
// fetches succeed, or not each of them fails, there is always one.
func TestALeaseIsRenewedBeforeItEnds(t *testing.T) {
	for _, timeout := range []time.Duration{time.Minute, 5 * time.Minute, time.Hour} {
		for _, lifetime := range []time.Duration{15 * time.Second, 100 * time.Second, 15 * time.Minute, 20 * time.Minute, time.Hour, 24 * time.Hour} {
			t.Run(fmt.Sprintf("timeout %s, lifetime %s", timeout, lifetime), func(t *testing.T) {
				v := &verdicts{lifetime: lifetime, takes: 2 * time.Second}
				if n := withoutKEK(t, v, timeout, 6*time.Hour); n > 0 {
					t.Errorf("without a KEK for %d s", n)
				}
				// No more often than the lease or the timeout asks for.
				if most := int(6 * time.Hour / min(lifetime/3, Interval(timeout)/2)); v.asked > most {
					t.Errorf("the key service was asked %d times, %d are enough", v.asked, most)
				}
				if lifetime < time.Minute {
					return // a fetch that hangs takes longer than what is left
				}
				v = &verdicts{lifetime: lifetime, takes: 2 * time.Second, fails: func(n int) bool { return n > 4 && n%2 == 0 }}
				if n := withoutKEK(t, v, timeout, 6*time.Hour); n > 0 {
					t.Errorf("with each second fetch failing, without a KEK for %d s", n)
				}
			})
		}
	}
}

// A verdict that no fetch can renew in time is refused in words, and not used for as
// long as it lasts.
func TestALeaseThatIsTooShortIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &verdicts{lifetime: minLease - time.Second}
		v.dek = kekA
		a := &Attested{Keys: v, Volume: "etcd-kek", Left: Lease(MinTimeout)}
		if err := a.Init(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := NewRefresher(t.Context(), a, Options{}); failure.Of(err).Class != failure.Configuration {
			t.Errorf("got %v", err)
		}
	})
}

// Case 84: once the key service refuses, the lease ends what there is, and no sooner
// than it must by more than the last tries take.
func TestALeaseIsNotOutlived(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const lease = 30 * time.Minute
		s := &script{t: t, answers: []string{kekA, gone}, lease: lease}
		r, err := NewRefresher(t.Context(), s, Options{Timeout: 5 * time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		started := time.Now()
		for r.Ring().Health().Keys > 0 {
			time.Sleep(time.Second)
		}
		if took := time.Since(started); took > lease+time.Second || took < lease-lease/50 {
			t.Errorf("wiped after %s of %s", took, lease)
		}
		cancel()
		<-done
	})
}
