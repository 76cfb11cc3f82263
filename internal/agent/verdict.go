package agent

import (
	"bytes"
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
	asking  bool          // the key service is being asked
	going   bool          // it is being resumed
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
	case failure.Revoked, failure.PolicyDenied, failure.EvidenceRefused, failure.NotFound:
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
	if !c.currentLocked(d) {
		c.mu.Unlock()
		return
	}
	v := &d.e.verdict
	if err == nil {
		withheld := d.e.known.Withheld && !v.going
		*v = verdict{heard: now, next: now + soon(verdictEvery), asking: v.asking, going: v.going || withheld}
		delete(d.e.warnings, "verdict")
		c.mu.Unlock()
		c.contacted(d.id, d.e)
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
		d.e.givesBack = true
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
	c.mu.Unlock()
	if over && (!again || then != node.Keep) {
		c.revoke(ctx, d, then, again, what+": "+err.Error())
	}
}

// onRevoke is what is done with the volume. The lock is held.
func (c *Volumes) onRevoke(e *entry) node.OnRevoke {
	if e.spec.OnRevoke == "" && (e.known.Initrd || e.known.FromInitrd) {
		return node.Keep // the root, without which nothing here could resume it
	}
	return cmp.Or(e.spec.OnRevoke, node.Suspend)
}

// revoke does what on_revoke says, when a volume's grace is over. It is called at each refusal
// from then on: a close is tried once, and a suspension as often as it takes. A later good
// verdict lets what was suspended go on.
//
// Who mounts, checks, grows or closes the volume would wait for the disk with the volume's turn,
// and nobody could let it go on: nothing is done before that is over.
func (c *Volumes) revoke(ctx context.Context, d due, then node.OnRevoke, again bool, why string) {
	if !again {
		c.Log.Error("this machine may not have a volume any more", "volume", d.id, "on_revoke", string(then), "why", why)
	}
	if then == node.Keep {
		c.set(func() { d.e.verdict.done = true })
		return
	}
	turn, cancel := context.WithTimeout(ctx, turnWait)
	give, err := c.take(turn, d.id, d.e)
	cancel()
	if err != nil {
		c.Log.Warn("a volume that is to be suspended is being worked on", "volume", d.id)
		return
	}
	defer give()
	if !c.current(d) {
		return
	}
	c.set(func() { d.e.verdict.done = true })
	c.mu.Lock()
	suspended := d.e.condition.state == Suspended
	c.mu.Unlock()
	// What is suspended cannot be unmounted: that would write first.
	if then == node.Shut && !again && !suspended {
		err := c.closeTaken(ctx, d.id, d.e)
		if err == nil {
			return
		}
		c.Log.Error("it could not be closed, and is suspended in place of that", "volume", d.id, "error", err)
	}
	c.fence(ctx, d, why)
}

// goOnLimit bounds an attempt to resume a volume.
const goOnLimit = 20 * time.Second

// goOn resumes a volume that had to wait for a better verdict, or its lease. It does not wait
// for the volume's turn for long, whose holder may wait for this.
func (c *Volumes) goOn(ctx context.Context, d due) {
	defer c.set(func() { d.e.verdict.going = false })
	ctx, stop := context.WithTimeout(luks.WithPatience(ctx, c.DeviceWait), goOnLimit)
	defer stop()
	turn, cancel := context.WithTimeout(ctx, turnWait)
	give, err := c.take(turn, d.id, d.e)
	cancel()
	if err == nil {
		defer give()
	}
	if err := c.letGoOn(ctx, d); err != nil {
		c.Log.Error("this machine may have the volume again, and it could not be resumed", "volume", d.id, "error", err)
		c.set(func() {
			d.e.verdict.next = keyclient.Boottime() + renewPause
			if l := d.e.lease; l != nil {
				l.next = d.e.verdict.next
			}
		})
		return
	}
	c.mu.Lock()
	v, dynamic, unfinished := d.e.spec, d.e.dynamic, d.e.lastErr != nil && isUp(d.e.condition.state)
	c.mu.Unlock()
	if unfinished { // an opening was refused meanwhile, and somebody wants the rest of it
		go func() { _, _ = c.Open(context.WithoutCancel(ctx), v, Intent{NoWait: true, Dynamic: dynamic}) }()
	}
}

func (c *Volumes) letGoOn(ctx context.Context, d due) error {
	e := d.e
	fences := 0
	waits := func() (v node.Volume, leaseID []byte, ok bool) {
		c.mu.Lock()
		defer c.mu.Unlock()
		fences, ok = e.fences, e.known.Withheld && c.currentLocked(d)
		if l := e.lease; l != nil {
			leaseID = l.id
			if l.bound && keyclient.Boottime() >= l.until-l.margin() {
				ok = false // it would have to stop at once
			}
		}
		return e.spec, leaseID, ok
	}
	v, leaseID, ok := waits()
	if !ok {
		return nil // somebody was faster, or it is another mapping
	}
	defer c.Keys.Hold()()
	key, err := c.Keys.GetKey(ctx, keyclient.Request{Volume: v.ID, ReadOnly: v.ReadOnly, LeaseID: leaseID})
	if err != nil {
		return err
	}
	defer key.Close()
	if _, _, ok := waits(); !ok || key.Lease != nil && !bytes.Equal(key.Lease.ID, leaseID) {
		// It was closed meanwhile, or the lease that it had is not there any more, and another
		// node may have had the volume: the next renewal says so.
		if key.Lease != nil && !bytes.Equal(key.Lease.ID, leaseID) {
			c.release(context.WithoutCancel(ctx), v.ID, key.Lease.ID)
		}
		return nil
	}
	err = c.either(ctx, v.DevicePath(), key, v.ReadOnly, func(kept *luks.Header) error {
		c.mu.Lock()
		h := cmp.Or(kept, e.header)
		c.mu.Unlock()
		if h != nil && h.MACs() != luksMACs(key.MACs) {
			h = nil // of another key than the present one: what is in front counts
		}
		_, err := luks.Resume(ctx, luks.Existing{Device: v.DevicePath(), Name: v.Name, Identity: identity(key), MACs: luksMACs(key.MACs), Header: h}, key.DEK)
		return err
	})
	if err != nil {
		return classify(err)
	}
	c.mu.Lock()
	again := e.fences != fences
	c.mu.Unlock()
	if again {
		return nil // it was suspended meanwhile, and stays so
	}
	c.Log.Info("the volume goes on", "volume", v.ID)
	c.warn(e, "fence", "")
	c.withhold(e, false)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch s := &e.condition; {
	case s.state == Suspended:
		s.state = s.running
	case s.state == Closing && s.kept == Suspended:
		s.kept = s.running
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
		case e.lease != nil || e.spec.Throwaway() || e.known.UUID == "":
			continue
		case !isUp(e.condition.state) && !e.known.Withheld: // what is suspended may be waited for by who closes it
			continue
		case e.verdict.next == 0:
			e.verdict.heard, e.verdict.next = now, now+soon(verdictEvery)
			continue
		case now < e.verdict.next:
			continue
		}
		e.verdict.next = now + renewPause
		out = append(out, due{id: id, e: e, sequence: e.known.Sequence})
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
	callCtx, cancel := context.WithTimeout(ctx, renewLimit)
	defer cancel()
	err := c.Keys.Verdict(callCtx, d.id, readOnly)
	c.end(d.e)
	defer c.heard(ctx, d.id, err) // when all else is done
	switch class := failure.Of(err).Class; {
	case ctx.Err() != nil:
	case class == failure.State: // it was retired
		c.cut(ctx, d, err)
	default:
		c.judged(ctx, d, err)
	}
}
