package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
)

// Two write the state of a volume: who has its turn, and who renews its lease. Neither
// undoes what the other one wrote, and neither finds a file that the other one took away.
func TestTwoWritersOfAStateKeepEachOthersWords(t *testing.T) {
	c := NewVolumes(Options{Keys: &scriptedLeases{}, Log: slog.New(slog.DiscardHandler), StateDir: t.TempDir()})
	e := c.entryOf("data")
	e.spec = node.Volume{ID: "data", Name: "ka-test-state", Device: "/dev/null"}
	e.known = remembered{Spec: e.spec, UUID: "0b5f6d0e-7c1a-4a52-9a86-3d0e6f1c2b4a"}
	c.hold(e, &keyclient.Lease{ID: make([]byte, 16), Term: time.Minute})
	const rounds = 300
	for round := range rounds {
		var both sync.WaitGroup
		errs := make(chan error, 2)
		both.Go(func() {
			c.set(func() { e.known.Mount = strconv.Itoa(round) })
			errs <- c.rememberKnown(e)
		})
		both.Go(func() {
			c.renewed(t.Context(), due{id: "data", e: e, lease: lease{id: make([]byte, 16)}}, &keyclient.Lease{ID: make([]byte, 16), Term: time.Minute, Until: time.Duration(round)})
			errs <- nil
		})
		both.Wait()
		if err := errors.Join(<-errs, <-errs); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		r, ok := c.recall("data")
		if got, want := fmt.Sprint(r.Mount, r.LeaseUntil, ok), fmt.Sprint(strconv.Itoa(round), time.Duration(round), true); got != want {
			t.Fatalf("round %d: the file has %s, want %s", round, got, want)
		}
	}
}

// The end of an opening writes what is known by then, and not what was known before a
// renewal.
func TestTheEndOfAnOpeningKeepsARenewal(t *testing.T) {
	c, e := holding(t, &scriptedLeases{}, false, time.Minute)
	for round := range 300 {
		var both sync.WaitGroup
		both.Go(func() { c.finish(&opening{Volumes: c, e: e, v: e.spec}, nil) })
		both.Go(func() {
			c.renewed(t.Context(), due{id: "data", e: e, lease: lease{id: make([]byte, 16)}}, &keyclient.Lease{ID: make([]byte, 16), Term: time.Minute, Until: time.Duration(round)})
		})
		both.Wait()
		if r, ok := c.recall("data"); !ok || r.LeaseUntil != time.Duration(round) {
			t.Fatalf("round %d: the file has %s", round, r.LeaseUntil)
		}
	}
}
