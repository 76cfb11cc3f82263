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
	"github.com/keyagent/keyagent/luks"
)

// verdict is what the key service said last of this machine and an open volume. All times
// are by keyclient.Boottime, which the host's clock does not move and which counts while the
// machine sleeps.
type verdict struct {
	heard   time.Duration // when it last was one, good or not
	refused time.Duration // the first refusal since the last good one; 0: none
	next    time.Duration // when it is asked for, of a volume without a lease
	done    bool          // what on_revoke says was begun
	asking  bool          // an attempt is under way
}

// A volume without a lease, as one that many write or that is read, is asked after by
// itself.
const verdictEvery = 5 * time.Minute

// turnWait is how long what a verdict demands waits for other work on the volume, before it
// is tried at the next one.
const turnWait = 2 * time.Second

// soon spreads what many nodes do at the same time: it is somewhat earlier than d.
func soon(d time.Duration) time.Duration { return d - rand.N(d/5+1) }

// refuses reports whether an answer is a verdict against this machine. Anything else is no
// verdict: the key service was not reached, or could not decide.
func refuses(class failure.Class) bool {
	switch class {
	case failure.Revoked, failure.PolicyDenied, failure.EvidenceRefused:
		return true
	}
	return false
}

// begin says that an attempt to renew begins, unless one is under way.
func (c *Volumes) begin(e *entry) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.verdict.asking {
		return false
	}
	e.verdict.asking = true
	return true
}

func (c *Volumes) end(e *entry) { c.set(func() { e.verdict.asking = false }) }

// judged takes note of a verdict on an open volume, nil for a good one, and does what the
// volume's on_revoke says when its grace is over.
func (c *Volumes) judged(ctx context.Context, d due, err error) {
	now := keyclient.Boottime()
	c.mu.Lock()
	v := &d.e.verdict
	if err == nil {
		withheld := d.e.known.Withheld
		*v = verdict{heard: now, next: now + soon(verdictEvery), asking: v.asking}
		delete(d.e.warnings, "verdict")
		c.mu.Unlock()
		if withheld {
			c.goOn(ctx, d)
		}
		return
	}
	class := failure.Of(err).Class
	v.heard = cmp.Or(v.heard, now) // it was opened a moment ago
	what := "the key service gives no verdict on it"
	if refuses(class) {
		v.refused, v.heard = cmp.Or(v.refused, now), now
		what = "the key service refuses it to this machine"
	}
	refused, unreachable, _ := d.e.spec.Grace.Limits() // validated
	left, ends := time.Duration(0), false
	if v.refused > 0 { // only a good verdict ends that
		left, ends = v.refused+refused-now, true
	}
	if until := v.heard + unreachable - now; unreachable > 0 && (!ends || until < left) {
		left, ends = until, true
	}
	if class == failure.Revoked {
		left, ends, what = 0, true, "an operator revoked it"
	}
	then := c.onRevoke(d.e)
	over, again := ends && left <= 0, v.done
	v.next = now + renewPause
	text := fmt.Sprintf("%s: %v", what, err)
	switch {
	case then == node.Keep:
		text += "; it stays open, as on_revoke says"
	case ends && !over:
		v.next = min(v.next, now+left)
		text += fmt.Sprintf("; in %s: on_revoke %s", left.Round(time.Second), then)
	}
	d.e.warnings["verdict"] = text
	v.done = v.done || over
	c.mu.Unlock()
	switch {
	case !over || again && then == node.Keep:
	case again:
		c.suspendFor(ctx, d, what) // as often as it takes
	default:
		c.revoke(ctx, d, then, what+": "+err.Error())
	}
}

// onRevoke is what is done with the volume. The lock is held.
func (c *Volumes) onRevoke(e *entry) node.OnRevoke {
	if e.spec.OnRevoke == "" && (e.known.Initrd || e.known.FromInitrd) {
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
	c.suspendFor(ctx, d, why)
}

// suspendFor suspends a volume for a verdict, if nobody works on it: who mounts, checks, grows or
// closes it would wait for the disk with the volume's turn, and nobody could let it go on. It is
// tried again then.
func (c *Volumes) suspendFor(ctx context.Context, d due, why string) {
	turn, cancel := context.WithTimeout(ctx, turnWait)
	defer cancel()
	give, err := c.take(turn, d.id, d.e)
	if err != nil {
		c.Log.Warn("a volume that is to be suspended is being worked on", "volume", d.id)
		return
	}
	defer give()
	c.fence(ctx, d, why)
}

// goOn resumes a volume that had to wait for a better verdict, or its lease. It does not wait
// for the volume's turn, whose holder may wait for this.
func (c *Volumes) goOn(ctx context.Context, d due) {
	turn, cancel := context.WithTimeout(ctx, turnWait)
	defer cancel()
	if give, err := c.take(turn, d.id, d.e); err == nil {
		defer give()
	}
	if err := c.letGoOn(luks.WithPatience(ctx, c.DeviceWait), d.e); err != nil {
		c.Log.Error("this machine may have the volume again, and it could not be resumed", "volume", d.id, "error", err)
		c.set(func() { d.e.verdict.next = keyclient.Boottime() + renewPause })
		return
	}
	c.Log.Info("the volume goes on", "volume", d.id)
}

func (c *Volumes) letGoOn(ctx context.Context, e *entry) error {
	c.mu.Lock()
	withheld := e.known.Withheld
	c.mu.Unlock()
	if !withheld {
		return nil // somebody was faster
	}
	err := c.withKeyOf(ctx, e, func(k *keyclient.Key, r luks.Existing) error {
		_, err := luks.Resume(ctx, r, k.DEK)
		return err
	}, true)
	if err != nil {
		return err
	}
	c.warn(e, "fence", "")
	c.withhold(e, false)
	c.mu.Lock()
	suspended := e.condition.state == Suspended
	c.mu.Unlock()
	if suspended {
		c.on(e, EventResume, nil)
	}
	return nil
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
			e.verdict = verdict{heard: now, next: now + soon(verdictEvery)}
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
	if !c.begin(d.e) {
		return
	}
	defer c.end(d.e)
	callCtx, cancel := context.WithTimeout(ctx, renewLimit)
	defer cancel()
	err := c.Keys.Verdict(callCtx, d.id, readOnly)
	switch class := failure.Of(err).Class; {
	case ctx.Err() != nil:
	case class == failure.State || class == failure.NotFound:
		c.cut(ctx, d, err)
	default:
		c.judged(ctx, d, err)
	}
}
