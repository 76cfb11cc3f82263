package agent

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/measured"
	"github.com/keyagent/keyagent/internal/node"
)

// The lease of a mapping that came from the initrd is not renewed before this system
// proved anything, and one that is bound stops writing in time all the same. In the
// initrd itself it is renewed.
func TestALeaseOfTheInitrdIsNotRenewedWithoutProof(t *testing.T) {
	for _, tt := range []struct {
		name         string
		bound        bool
		left         time.Duration
		fromInitrd   bool
		inInitrd     bool
		wantRenewals int
		wantState    State
	}{
		{"this system's own", false, time.Minute, false, false, 1, Open},
		{"handed over", false, time.Minute, true, false, 0, Open},
		{"handed over, bound, and nearly over", true, 20 * time.Second, true, false, 0, Suspended},
		{"in the initrd", false, time.Minute, true, true, 1, Open},
	} {
		keys := &scriptedLeases{}
		c, e := holding(t, keys, tt.bound, tt.left)
		c.Initrd, e.known.Initrd = tt.inInitrd, tt.fromInitrd
		c.renewNow(t, keyclient.Boottime()+time.Hour)
		if keys.asked != tt.wantRenewals || e.condition.state != tt.wantState {
			t.Errorf("%s: renewed %d times, it is %s", tt.name, keys.asked, e.condition.state)
		}
		warned := strings.Contains(strings.Join(c.view(e).Warnings, "; "), "has not proved yet")
		if warned != (tt.wantRenewals == 0) {
			t.Errorf("%s: %q", tt.name, c.view(e).Warnings)
		}
	}
}

// What OpenAll opens anew is proved by that. All else that the initrd left is named here,
// and nothing of what the initrd would do beyond it.
func TestWhatTheInitrdLeftIsFound(t *testing.T) {
	c := NewVolumes(Options{Log: slog.New(slog.DiscardHandler), StateDir: t.TempDir()})
	add := func(id string, state State, initrd bool) node.Volume {
		v := node.Volume{ID: id, Name: id, Device: "/dev/" + id, Mount: "/sysroot/" + id, Format: true, From: &node.Image{}}
		e := c.entryOf(id)
		e.spec, e.known, e.condition.state = v, remembered{Spec: v, Initrd: initrd}, state
		return v
	}
	listed := add("listed", Open, true)
	request := add("request", Open, true)
	request.OnRequest = true
	add("unlisted", Suspended, true)
	add("own", Open, false)
	add("closed", Absent, true)
	got := c.handedOver([]node.Volume{listed, request})
	slices.SortFunc(got, func(a, b node.Volume) int { return strings.Compare(a.ID, b.ID) })
	if len(got) != 2 || got[0].ID != "request" || got[1].ID != "unlisted" {
		t.Fatalf("%+v", got)
	}
	if v := got[1]; v.Mount != "" || v.Format || v.From != nil {
		t.Errorf("%+v", v)
	}
	c.Initrd = true
	if got := c.handedOver(nil); got != nil {
		t.Errorf("in the initrd: %+v", got)
	}
}

// busy is a register that a TPM's driver keeps busy.
type busy struct {
	measured.None
	looks int
}

func (b *busy) Ready(context.Context) error {
	b.looks++
	return failure.Newf(failure.DeviceBusy, "", "busy")
}

// What fails in a way that may pass is proved again, and holds up no other.
func TestAProofThatMayPassIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		register := &busy{}
		c := NewVolumes(Options{Keys: unasked{t: t}, Log: slog.New(slog.DiscardHandler), StateDir: t.TempDir(), Register: register})
		ctx, cancel := context.WithTimeout(t.Context(), 65*time.Second)
		defer cancel()
		c.ProveHandedOver(ctx, []node.Volume{{ID: "one", Name: "one", Device: "/dev/keyagent-none", Measure: true}})
		if register.looks < 5 {
			t.Errorf("it was looked at %d times", register.looks)
		}
	})
}
