package agent

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
)

func (s *scriptedLeases) Verdict(context.Context, string, bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.verdicts++
	return s.err
}

// What becomes of an open volume depends on who says no, for how long, and what its
// description wants.
func TestAVerdictIsInForceWhenItsGraceIsOver(t *testing.T) {
	class := func(c failure.Class) error { return failure.New(c, errors.New("no"), "") }
	for name, tt := range map[string]struct {
		err      error
		onRevoke node.OnRevoke
		grace    node.Grace
		initrd   bool
		since    time.Duration // of the first such answer
		want     State
	}{
		"refused a moment ago":                       {err: class(failure.PolicyDenied), want: Open},
		"refused, its hour not over":                 {err: class(failure.EvidenceRefused), since: 59 * time.Minute, want: Open},
		"refused for an hour":                        {err: class(failure.EvidenceRefused), since: time.Hour, want: Suspended},
		"refused without grace":                      {err: class(failure.PolicyDenied), grace: node.Grace{Refused: "none"}, want: Suspended},
		"refused for its own grace":                  {err: class(failure.PolicyDenied), grace: node.Grace{Refused: "10s"}, since: 10 * time.Second, want: Suspended},
		"refused for a year, and to be kept":         {err: class(failure.PolicyDenied), onRevoke: node.Keep, since: 365 * 24 * time.Hour, want: Open},
		"revoked":                                    {err: class(failure.Revoked), want: Suspended},
		"revoked, with grace for what a policy says": {err: class(failure.Revoked), grace: node.Grace{Refused: "24h"}, want: Suspended},
		"revoked, and to be kept":                    {err: class(failure.Revoked), onRevoke: node.Keep, want: Open},
		"revoked, from the initrd":                   {err: class(failure.Revoked), initrd: true, want: Open},
		"revoked, from the initrd, and said so":      {err: class(failure.Revoked), initrd: true, onRevoke: node.Suspend, want: Suspended},
		"unreachable for a year":                     {err: class(failure.Unreachable), since: 365 * 24 * time.Hour, want: Open},
		"unreachable, its grace not over":            {err: class(failure.Unreachable), grace: node.Grace{Unreachable: "24h"}, since: 23 * time.Hour, want: Open},
		"unreachable for its grace":                  {err: class(failure.Unreachable), grace: node.Grace{Unreachable: "24h"}, since: 24 * time.Hour, want: Suspended},
		"a server that is another, for its grace":    {err: class(failure.ServerUntrusted), grace: node.Grace{Unreachable: "24h"}, since: 24 * time.Hour, want: Suspended},
		"no TPM to prove anything with":              {err: class(failure.NoDevice), since: time.Hour, want: Open},
		"a good one":                                 {want: Open},
	} {
		for _, leased := range []bool{true, false} {
			keys := &scriptedLeases{err: tt.err}
			c, e := holding(t, keys, false, time.Minute)
			// As the agent of the real system has it, once it has proved what the initrd opened.
			e.spec.OnRevoke, e.spec.Grace, e.known.FromInitrd = tt.onRevoke, tt.grace, tt.initrd
			now := keyclient.Boottime()
			if refuses(failure.Of(tt.err).Class) {
				e.verdict.refused = now - tt.since
			}
			e.verdict.heard, e.verdict.next = now-tt.since, now
			if tt.since == 0 {
				e.verdict.refused = 0
			}
			if leased {
				c.renewNow(t, now+time.Hour)
			} else {
				e.lease = nil
				for _, d := range c.dueVerdicts(now) {
					c.askVerdict(t.Context(), d)
				}
				if keys.verdicts != 1 {
					t.Errorf("%s: asked %d times", name, keys.verdicts)
				}
			}
			if e.condition.state != tt.want {
				t.Errorf("%s, leased %v: it is %s, want %s", name, leased, e.condition.state, tt.want)
			}
			if warned := e.warnings["verdict"] != ""; warned != (tt.err != nil) {
				t.Errorf("%s, leased %v: status says %q", name, leased, e.warnings["verdict"])
			}
		}
	}
}

// Only a good verdict ends a refusal: an answer that got lost does not.
func TestARefusalStandsUntilAGoodVerdict(t *testing.T) {
	keys := &scriptedLeases{}
	c, e := holding(t, keys, false, time.Minute)
	e.spec.Grace = node.Grace{Refused: "10m", Unreachable: "5m"}
	e.lease = nil
	say := func(class failure.Class) {
		t.Helper()
		e.verdict.next = 1
		keys.err = nil
		if class != "" {
			keys.err = failure.New(class, errors.New("no"), "")
		}
		for _, d := range c.dueVerdicts(keyclient.Boottime()) {
			c.askVerdict(t.Context(), d)
		}
	}
	say(failure.PolicyDenied)
	e.verdict.refused -= 9 * time.Minute
	say(failure.PolicyDenied)
	if e.condition.state != Open || !strings.Contains(e.warnings["verdict"], "in 1m0s: on_revoke suspend") {
		t.Fatalf("%s, %q", e.condition.state, e.warnings["verdict"])
	}
	say("")
	if e.verdict.refused != 0 || e.warnings["verdict"] != "" {
		t.Error("a good verdict did not end it")
	}
	say(failure.PolicyDenied)
	e.verdict.refused -= 9 * time.Minute
	e.verdict.heard -= 4 * time.Minute
	say(failure.Unreachable) // a refusal was heard four minutes ago
	if e.condition.state != Open {
		t.Error("the time in which it refused counts as one without an answer")
	}
	e.verdict.refused -= 2 * time.Minute
	say(failure.Unreachable)
	if e.condition.state != Suspended || !e.known.Withheld {
		t.Errorf("refused for eleven minutes it is %s", e.condition.state)
	}
}

// Who works on a volume may wait for its disk: it is suspended when that is over.
func TestNobodyIsSuspendedUnderWork(t *testing.T) {
	keys := &scriptedLeases{err: failure.New(failure.Revoked, errors.New("no"), "")}
	c, e := holding(t, keys, false, time.Minute)
	e.lease = nil
	ask := func() {
		e.verdict.next = 1
		for _, d := range c.dueVerdicts(keyclient.Boottime()) {
			c.askVerdict(t.Context(), d)
		}
	}
	give, err := c.take(t.Context(), "data", e)
	if err != nil {
		t.Fatal(err)
	}
	ask()
	if e.condition.state != Open || e.known.Withheld {
		t.Errorf("it is %s", e.condition.state)
	}
	give()
	ask()
	if e.condition.state != Suspended || !e.known.Withheld {
		t.Errorf("afterwards it is %s", e.condition.state)
	}
	// The next agent knows why, and a person's word is another one.
	if r, ok := c.recall("data"); !ok || !r.Withheld {
		t.Error("it is not remembered")
	}
	c.withhold(e, false)
	keys.err = nil
	ask()
	if e.condition.state != Suspended {
		t.Error("what somebody suspended by hand was resumed")
	}
}

// What was asked of a mapping says nothing of the next one.
func TestAnAnswerIsAboutTheMappingThatWasAskedFor(t *testing.T) {
	for name, class := range map[string]failure.Class{"revoked": failure.Revoked, "another node's": failure.Held, "retired": failure.State} {
		keys := &scriptedLeases{err: failure.New(class, errors.New("no"), "")}
		c, e := holding(t, keys, false, 0)
		due := c.dueLeases(keyclient.Boottime() + time.Hour)
		// It was closed, and opened again, while the key service was asked.
		e.known.Sequence = 7
		c.hold(e, &keyclient.Lease{ID: []byte("another"), Term: time.Hour, Until: keyclient.Boottime() + time.Hour})
		for _, d := range due {
			c.renew(t.Context(), d)
			c.askVerdict(t.Context(), d)
		}
		if e.condition.state != Open || e.lease.lost || e.known.Withheld || len(e.warnings) != 0 {
			t.Errorf("%s: it is %s, lost %v, %v", name, e.condition.state, e.lease.lost, e.warnings)
		}
	}
}

// What waits for its key service is tried again, what a person suspended is not.
func TestASuspendedVolumeIsTriedAgain(t *testing.T) {
	for _, withheld := range []bool{true, false} {
		c, e := holding(t, &scriptedLeases{}, true, time.Minute)
		e.condition.state, e.known.Withheld, e.lastErr = Suspended, withheld, failure.New(failure.Unreachable, errors.New("down"), "")
		if c.mayOpen("data", false) || c.mayOpen("data", true) != withheld {
			t.Errorf("withheld %v: soon %v, later %v", withheld, c.mayOpen("data", false), c.mayOpen("data", true))
		}
	}
}

// Nobody is asked twice at once.
func TestOneAttemptAtATime(t *testing.T) {
	keys := &scriptedLeases{}
	c, e := holding(t, keys, false, 0)
	if !c.begin(e) {
		t.Fatal("nothing is under way")
	}
	c.renewNow(t, keyclient.Boottime()+time.Hour)
	e.lease, e.verdict.next = nil, 1
	for _, d := range c.dueVerdicts(keyclient.Boottime()) {
		c.askVerdict(t.Context(), d)
	}
	if keys.asked+keys.verdicts != 0 {
		t.Error("it was asked meanwhile")
	}
}

// Nobody asks after what is closed, has a lease, or has a key of its own.
func TestAVerdictIsAskedForOfOpenVolumes(t *testing.T) {
	for name, change := range map[string]func(*entry){
		"closed":      func(e *entry) { e.condition.state = Absent },
		"leased":      func(e *entry) { e.lease = &lease{} },
		"a swap area": func(e *entry) { e.spec.Kind = node.Swap },
	} {
		c, e := holding(t, &scriptedLeases{}, false, time.Minute)
		e.lease, e.verdict.next = nil, 1
		change(e)
		if due := c.dueVerdicts(keyclient.Boottime()); len(due) != 0 {
			t.Errorf("%s: %v", name, due)
		}
	}
	c, e := holding(t, &scriptedLeases{}, false, time.Minute)
	e.lease = nil
	now := keyclient.Boottime()
	if due := c.dueVerdicts(now); len(due) != 0 { // it was opened with a good one
		t.Error("asked at once")
	}
	if at := e.verdict.next - now; at > verdictEvery || at < verdictEvery*4/5 {
		t.Errorf("asked after %s", at)
	}
}
