package agent

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
)

// verdict is what the key service said last of this machine and an open volume. All times
// are by keyclient.Boottime, which the host's clock does not move and which counts while the
// machine sleeps.
type verdict struct {
	good    time.Duration // when it was last good
	refused time.Duration // the first refusal since then; 0: none
	next    time.Duration // when it is asked for, of a volume without a lease
	done    bool          // what on_revoke says was begun
}

// A volume without a lease, as one that many write or that is read, is asked after by
// itself.
const verdictEvery = 5 * time.Minute

// soon spreads what many nodes do at the same time: it is somewhat earlier than d.
func soon(d time.Duration) time.Duration { return d - rand.N(d/5+1) }

// refuses reports whether an answer is a verdict against this machine or this volume. Anything
// else is no verdict: the key service was not reached, or could not decide.
func refuses(class failure.Class) bool {
	switch class {
	case failure.Revoked, failure.PolicyDenied, failure.EvidenceRefused, failure.State, failure.NotFound:
		return true
	}
	return false
}

// judged takes note of a verdict on an open volume, nil for a good one, and does what the
// volume's on_revoke says when its grace is over.
func (c *Volumes) judged(ctx context.Context, d due, err error) {
	now := keyclient.Boottime()
	c.mu.Lock()
	v := &d.e.verdict
	if err == nil {
		fenced := d.e.warnings["fence"] != "" && d.e.condition.state == Suspended
		*v = verdict{good: now, next: now + soon(verdictEvery)}
		delete(d.e.warnings, "verdict")
		c.mu.Unlock()
		if fenced {
			c.goOn(ctx, d)
		}
		return
	}
	v.next = now + renewPause
	if v.good == 0 {
		v.good = now // it was opened a moment ago
	}
	class := failure.Of(err).Class
	refused, unreachable, _ := d.e.spec.Grace.Limits() // validated
	left, endless := v.good+unreachable-now, unreachable == 0
	what := "the key service gives no verdict on it"
	if refuses(class) {
		v.refused = cmp.Or(v.refused, now)
		left, endless = v.refused+refused-now, false
		what = "the key service refuses it to this machine"
	} else {
		v.refused = 0
	}
	if class == failure.Revoked {
		left, what = 0, "an operator revoked it"
	}
	then := c.onRevoke(d.e)
	over := !endless && left <= 0
	again := v.done
	text := fmt.Sprintf("%s: %v", what, err)
	switch {
	case then == node.Keep:
		text += "; it stays open, as on_revoke says"
	case !endless && !over:
		v.next = min(v.next, now+left)
		text += fmt.Sprintf("; in %s: on_revoke %s", left.Round(time.Second), then)
	}
	d.e.warnings["verdict"] = text
	v.done = v.done || over
	c.mu.Unlock()
	switch {
	case !over || again && then == node.Keep:
	case again:
		c.fence(ctx, d, what) // as often as it takes
	default:
		c.revoke(ctx, d, then, what+": "+err.Error())
	}
}

// onRevoke is what is done with the volume. The lock is held.
func (c *Volumes) onRevoke(e *entry) node.OnRevoke {
	if e.spec.OnRevoke == "" && e.known.Initrd {
		return node.Keep // the root, without which nothing here could resume it
	}
	return cmp.Or(e.spec.OnRevoke, node.Suspend)
}

// revoke is done once, when a volume's grace is over. A later good verdict lets what was
// suspended go on.
func (c *Volumes) revoke(ctx context.Context, d due, then node.OnRevoke, why string) {
	c.Log.Error("this machine may not have a volume any more", "volume", d.id, "on_revoke", string(then), "why", why)
	switch then {
	case node.Keep:
		return
	case node.Shut:
		_, err := c.Close(ctx, d.id)
		if err == nil {
			return
		}
		c.Log.Error("it could not be closed, and is suspended in place of that", "volume", d.id, "error", err)
	}
	c.fence(ctx, d, why)
}

// goOn resumes a volume that had to wait for a better verdict, or its lease.
func (c *Volumes) goOn(ctx context.Context, d due) {
	if _, err := c.Resume(ctx, d.id); err != nil {
		c.Log.Error("this machine may have the volume again, and it could not be resumed", "volume", d.id, "error", err)
	}
}

// dueVerdicts returns the open volumes without a lease whose verdict is to be renewed now, and
// puts off their next turn.
func (c *Volumes) dueVerdicts(now time.Duration) []due {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []due
	for id, e := range c.entries {
		switch {
		case e.lease != nil || e.spec.Throwaway() || !isUp(e.condition.state) || e.known.UUID == "":
			continue
		case e.verdict.next == 0:
			e.verdict = verdict{good: now, next: now + soon(verdictEvery)}
			continue
		case now < e.verdict.next:
			continue
		}
		e.verdict.next = now + renewPause
		out = append(out, due{id: id, e: e})
	}
	return out
}

// askVerdict renews the verdict on a volume without a lease.
func (c *Volumes) askVerdict(ctx context.Context, d due) {
	c.mu.Lock()
	readOnly := d.e.spec.ReadOnly
	c.mu.Unlock()
	callCtx, cancel := context.WithTimeout(ctx, renewPause)
	defer cancel()
	err := c.Keys.Verdict(callCtx, d.id, readOnly)
	if ctx.Err() != nil {
		return
	}
	if failure.Of(err).Class == failure.Held {
		err = nil // the release before looks for a lease, and knows this machine
	}
	c.judged(ctx, d, err)
}
