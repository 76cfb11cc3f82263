package agent

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
)

// scriptedLeases is a key service that answers renewals as it is told.
type scriptedLeases struct {
	noKeys
	mu    sync.Mutex
	err   error
	asked int

	verdicts int

	sessions int
	left     time.Duration
}

func (s *scriptedLeases) KeepSession(_ context.Context, left time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessions++
	s.left = left
	return s.err
}

func (s *scriptedLeases) Renew(_ context.Context, _ string, id []byte) (*keyclient.Lease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	if s.err != nil {
		return nil, s.err
	}
	return &keyclient.Lease{ID: id, Term: 2 * time.Minute, Until: keyclient.Boottime() + 2*time.Minute}, nil
}

// holding is a core with one open volume whose lease ends in left.
func holding(t *testing.T, keys Keys, bound bool, left time.Duration) (*Volumes, *entry) {
	t.Helper()
	c := NewVolumes(Options{Keys: keys, Log: slog.New(slog.DiscardHandler), StateDir: t.TempDir()})
	e := c.entryOf("data")
	e.spec = node.Volume{ID: "data", Name: "ka-test-lease", Device: "/dev/null"}
	e.known = remembered{Spec: e.spec, UUID: "0b5f6d0e-7c1a-4a52-9a86-3d0e6f1c2b4a"}
	e.condition.state = Open
	c.hold(e, &keyclient.Lease{ID: make([]byte, 16), Term: 2 * time.Minute, Until: keyclient.Boottime() + left, Bound: bound})
	return c, e
}

func (c *Volumes) renewNow(t *testing.T, at time.Duration) {
	t.Helper()
	for _, d := range c.dueLeases(at) {
		c.renew(t.Context(), d)
	}
}

// A machine that shuts down is one that no profile accepts: the session on which leases go
// back is there before.
func TestASessionStandsForAsLongAsALeaseIsHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := &scriptedLeases{}
		c, e := holding(t, keys, false, time.Hour)
		go c.KeepLeases(t.Context())
		looked := func(within time.Duration, want int) {
			t.Helper()
			time.Sleep(within)
			synctest.Wait()
			keys.mu.Lock()
			defer keys.mu.Unlock()
			if keys.sessions != want {
				t.Errorf("it was seen to %d times, want %d", keys.sessions, want)
			}
		}
		looked(firstSession-time.Second, 0)
		looked(2*time.Second, 1)
		looked(2*lookSession, 3)
		if keys.left < lookSession+30*time.Second {
			t.Errorf("the verdict holds for %s, and is looked at each %s", keys.left, lookSession)
		}
		c.set(func() { e.lease = nil })
		looked(10*lookSession, 3)
		c.hold(e, &keyclient.Lease{ID: make([]byte, 16), Term: 2 * time.Hour, Until: keyclient.Boottime() + 2*time.Hour})
		looked(firstSession+2*time.Second, 4)
	})
}

func TestALeaseIsRenewedAfterAThirdOfItsTerm(t *testing.T) {
	keys := &scriptedLeases{}
	c, e := holding(t, keys, false, 2*time.Minute)
	now := keyclient.Boottime()
	c.renewNow(t, now+31*time.Second) // somewhat earlier is soon enough
	if keys.asked != 0 {
		t.Error("it was renewed too early")
	}
	c.renewNow(t, now+41*time.Second)
	if keys.asked != 1 || e.lease.until < now+2*time.Minute-time.Second {
		t.Errorf("asked %d times, until %v", keys.asked, e.lease.until-now)
	}
}

func TestAServiceThatIsDownSuspendsNobodyWhoIsNotBound(t *testing.T) {
	down := failure.New(failure.Unreachable, errors.New("down"), "")
	for _, tt := range []struct {
		name  string
		bound bool
		left  time.Duration
		want  State
	}{
		{"not bound, and over", false, -time.Hour, Open},
		{"bound, with time left", true, time.Minute, Open},
		{"bound, within the margin", true, 29 * time.Second, Suspended},
		{"bound, and over", true, -time.Second, Suspended},
	} {
		t.Run(tt.name, func(t *testing.T) {
			keys := &scriptedLeases{err: down}
			c, e := holding(t, keys, tt.bound, tt.left)
			c.renewNow(t, keyclient.Boottime()+time.Hour)
			if e.condition.state != tt.want {
				t.Errorf("it is %s, want %s", e.condition.state, tt.want)
			}
			if keys.asked == 0 {
				t.Error("it stopped trying to renew")
			}
			if v := c.view(e); len(v.Warnings) == 0 {
				t.Error("status has no word of it")
			}
		})
	}
}

// TestAnotherNodesVolumeIsCutOff: what the key service says counts, whatever the
// lease's time.
func TestAnotherNodesVolumeIsCutOff(t *testing.T) {
	for _, class := range []failure.Class{failure.Held, failure.State} {
		keys := &scriptedLeases{err: failure.New(class, errors.New("another node has it"), "")}
		c, e := holding(t, keys, false, time.Minute)
		c.renewNow(t, keyclient.Boottime()+time.Hour)
		if v := c.view(e); v.State != Failed || v.Lease != "lost" {
			t.Errorf("%s: %+v", class, v)
		}
		before := keys.asked
		c.renewNow(t, keyclient.Boottime()+2*time.Hour)
		if keys.asked != before {
			t.Error("a lease that is lost is renewed again")
		}
	}
	// A refusal of the machine itself is another matter: the volume is still its own.
	keys := &scriptedLeases{err: failure.New(failure.EvidenceRefused, errors.New("no"), "")}
	c, e := holding(t, keys, false, time.Minute)
	c.renewNow(t, keyclient.Boottime()+time.Hour)
	if e.condition.state != Open {
		t.Errorf("it is %s", e.condition.state)
	}
}
