package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/internal/offline"
	"github.com/keyagent/keyagent/luks"
)

// Keeper keeps keys for the time in which no key service answers, see internal/offline.
type Keeper interface {
	// Keep keeps a key that came with leave to do so, in the place of an earlier one.
	Keep(ctx context.Context, k *keyclient.Key) error
	// Open returns a key that is kept, within its limits. The caller closes it.
	Open(ctx context.Context, volume string) (*keyclient.Key, offline.Use, error)
	// Forget destroys what is kept. It is fine if nothing is.
	Forget(ctx context.Context, volume string) (had bool, err error)
	// Has reports whether something seems to be kept. The disk's owner can hide it.
	Has(volume string) bool
	// Used is what was opened and not reported yet.
	Used(ctx context.Context, volume string) (use offline.Use, ok bool)
}

// One invariant is behind all of this: who has a kept key has the volume's lease. So the key
// is destroyed before the lease goes back, and a closed volume whose key is kept keeps its
// lease.

// The pauses between two grants: a grant is renewed when a quarter of its time has passed,
// since an outage may begin at any moment and a boot counts from the last one. Each writes a
// counter of the TPM, which wears out.
const (
	keptPart   = 4
	keptMost   = 6 * time.Hour
	keptPause  = time.Minute      // at least, whatever happens
	keptRefuse = 10 * time.Minute // after a refusal: the policy may be another one by then
)

// listening is a key service of which each refusal ends what is kept. That of a renewal does so
// where the volume was suspended before: a TPM that hangs must not hold that up.
type listening struct {
	Keys
	v *Volumes
}

// GetKey implements Getter.
func (l *listening) GetKey(ctx context.Context, r keyclient.Request) (*keyclient.Key, error) {
	k, err := l.Keys.GetKey(ctx, r)
	if !r.Format && !r.Clone && !r.Rotate && !r.Next && !r.Diskless { // what else is refused says nothing of opening it
		l.v.heard(ctx, r.Volume, err)
	}
	return k, err
}

// Retire implements Retirer.
func (l *listening) Retire(ctx context.Context, volume string, lease []byte) (string, bool, error) {
	uuid, kept, err := l.Keys.Retire(ctx, volume, lease)
	if err == nil {
		_ = l.v.forgetKept(ctx, volume, true) // it says so itself
	}
	return uuid, kept, err
}

// heard takes note of an answer. What is no answer of the key service's own changes nothing.
func (c *Volumes) heard(ctx context.Context, id string, err error) {
	if err == nil {
		return
	}
	if class := failure.Of(err).Class; refuses(class) || class == failure.State || class == failure.Held {
		_ = c.forgetKept(ctx, id, false) // it says so itself
	}
}

// forgetTimeout bounds one destruction, which waits for other processes that use the TPM.
const forgetTimeout = 30 * time.Second

// forgetKept destroys what is kept of a volume. What the disk shows is the host's to say, and so
// with sure the TPM is asked in any case: another process may have kept it, or a configuration
// before this one. Others may write the volume after that.
func (c *Volumes) forgetKept(ctx context.Context, id string, sure bool) error {
	if c.Offline == nil {
		return nil
	}
	e := c.entryOf(id)
	c.mu.Lock()
	e.keptGeneration++
	nothing := !sure && (e.keptNothing || e.spec.Offline == nil) && !c.Offline.Has(id)
	c.mu.Unlock()
	if nothing {
		return nil
	}
	// It must not be lost with the request, nor hold anybody up for ever.
	forget, cancel := context.WithTimeout(context.WithoutCancel(ctx), forgetTimeout)
	defer cancel()
	had, err := c.Offline.Forget(forget, id)
	c.mu.Lock()
	never := e.keptAt == 0 && e.known.KeptNext == 0 && !c.Offline.Has(id)
	c.mu.Unlock()
	if never && err != nil && (errors.Is(err, fs.ErrNotExist) || e.spec.Offline == nil) {
		// A machine without a TPM, or without one that works and for a volume that is not to be
		// kept: nothing ever was, as far as it knows.
		c.Log.Debug("could not look whether a key is kept of a volume", "volume", id, "error", err)
		err = nil
	}
	if err != nil {
		c.warn(e, "kept", "its key may still be kept in the TPM: "+err.Error())
		c.Log.Error("could not destroy the key that is kept of a volume", "volume", id, "error", err)
		return err
	}
	c.set(func() { e.keptNothing = true })
	c.warn(e, "kept", "")
	if had {
		c.Log.Info("the key that was kept of a volume is destroyed", "volume", id)
	}
	return nil
}

// wants is what the volume would be kept for.
func (c *Volumes) wants(v *node.Volume) keyclient.OfflineLimits {
	if c.Offline == nil || v.Offline == nil {
		return keyclient.OfflineLimits{}
	}
	l, _ := v.Offline.Limits() // validated
	return keyclient.OfflineLimits{For: l.For, Boots: l.Boots}
}

// generation is to be read before the key service is asked for a key that is to be kept.
func (c *Volumes) generation(e *entry) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return e.keptGeneration
}

// keepKey keeps a key that the key service gave for an active volume, or destroys what was
// kept if it does not allow that. It never stops an opening. since is the generation of when
// it was asked: a refusal that was heard meanwhile counts.
func (c *Volumes) keepKey(ctx context.Context, id string, e *entry, k *keyclient.Key, since int) {
	if c.Offline == nil || k.State != keyclient.Active {
		return
	}
	c.mu.Lock()
	v, last := e.spec, e.keptAt
	c.mu.Unlock()
	if k.Offline == nil || v.Offline == nil {
		c.set(func() { e.keptNext = keyclient.Boottime() + soon(keptRefuse) })
		if err := c.forgetKept(ctx, id, false); err == nil && k.OfflineWhy != "" {
			c.warn(e, "kept", "no key is kept for an outage of the key service: "+k.OfflineWhy)
			c.Log.Warn("no key is kept for an outage of the key service", "volume", id, "why", k.OfflineWhy, "correlation_id", k.CorrelationID)
		}
		return
	}
	now := keyclient.Boottime()
	if last > 0 && now < last+keptPause { // of an opening that failed a moment ago, and is tried again and again
		c.set(func() { e.keptNext = last + keptPause })
		_ = c.forgetKept(ctx, id, false) // it has another lease
		return
	}
	c.set(func() {
		e.keptNothing, e.givesBack, e.keptAt = false, false, now
		e.keptNext = now + soon(max(keptPause, min(k.Offline.For/keptPart, keptMost)))
	})
	err := c.step(ctx, "kept for an outage", func() error { return c.Offline.Keep(ctx, k) })
	switch {
	case err != nil:
		_ = c.forgetKept(ctx, id, false) // what was kept before has another lease
		c.warn(e, "kept", "its key is not kept for an outage of the key service: "+err.Error())
		c.Log.Error("could not keep the key of a volume for an outage", "volume", id, "error", err)
	case c.generation(e) != since:
		_ = c.forgetKept(ctx, id, false)
	default:
		c.warn(e, "kept", "")
	}
}

// openKept returns the key that is kept of a volume that nothing is mapped of, after the key
// service could not be reached.
func (o *opening) openKept(ctx context.Context) (*keyclient.Key, error) {
	o.mu.Lock()
	heard := o.e.verdict.heard
	o.mu.Unlock()
	if _, unreachable, _ := o.v.Grace.Limits(); unreachable > 0 && keyclient.Boottime()-heard >= unreachable {
		return nil, errGraceOver
	}
	k, use, err := o.Offline.Open(ctx, o.v.ID)
	if err != nil {
		return nil, err
	}
	k.Lease.Until = keyclient.Boottime() // it is to be renewed at once
	o.kept = &keptUse{Boots: use.Boots, BootsLeft: use.BootsLeft, Since: use.Since, TimeLeft: use.TimeLeft}
	o.Log.Warn("OFFLINE: no key service answers, and the volume is opened with the key that was kept in the TPM",
		"volume", o.v.ID, "boots_used", use.Boots, "boots_left", use.BootsLeft, "time_left", use.TimeLeft.Round(time.Second))
	o.before = heard
	o.offlineNow(o.v.ID, o.e, *o.kept, heard)
	return k, nil
}

var errGraceOver = errors.New("no key service has answered for longer than grace.unreachable")

// keptUse is remembered of a volume that was opened so, until the key service knows of it.
type keptUse struct {
	Boots     uint32        `json:"boots"`
	BootsLeft uint32        `json:"boots_left"`
	Since     time.Duration `json:"since"`
	TimeLeft  time.Duration `json:"time_left"`
}

// offlineNow says that a volume is open without the key service's word, and has that told with
// the next question.
func (c *Volumes) offlineNow(id string, e *entry, use keptUse, heard time.Duration) {
	c.warn(e, "offline", fmt.Sprintf("opened without the key service, in %d boots so far; %d boots and %s of the TPM's clock were left",
		use.Boots, use.BootsLeft, use.TimeLeft.Round(time.Second)))
	// The grace for a key service that is not reached counts from the start of the machine, or
	// from its last word since then.
	c.set(func() { e.verdict.heard = max(heard, 1) })
	c.Keys.Report(id, keyclient.OfflineReport{Boots: use.Boots, Since: use.Since})
}

// contacted ends that, after a good verdict.
func (c *Volumes) contacted(id string, e *entry) {
	c.mu.Lock()
	was := e.known.Offline != nil
	if was {
		e.known.Offline = nil
		e.keptNext = 0 // its limits begin anew
		delete(e.warnings, "offline")
	}
	c.mu.Unlock()
	if !was {
		return
	}
	c.Log.Info("the key service knows of a volume that was opened without it", "volume", id)
	if err := c.rememberKnown(e); err != nil {
		c.Log.Warn("could not keep the state of a volume", "volume", id, "error", err)
	}
}

// dueKept returns the volumes whose grant is to be renewed, and puts off their next turn.
// While the key service does not answer, their leases say so.
func (c *Volumes) dueKept(now time.Duration) []due {
	if c.Offline == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []due
	for id, e := range c.entries {
		l := e.lease
		switch {
		case e.spec.Offline == nil, e.known.Offline != nil, l == nil || l.lost || l.bound, e.condition.state != Open && e.condition.state != Mounted,
			e.known.Initrd && !c.Initrd, e.warnings["lease"] != "", e.warnings["verdict"] != "", now < e.keptNext:
			continue
		}
		e.keptNext = now + keptPause
		out = append(out, due{id: id, e: e, lease: *l, sequence: e.known.Sequence})
	}
	return out
}

// renewKept asks for another grant. It has the volume's turn, since a close meanwhile would
// give the lease back.
func (c *Volumes) renewKept(ctx context.Context, d due) {
	turn, cancel := context.WithTimeout(ctx, turnWait)
	give, err := c.take(turn, d.id, d.e)
	cancel()
	if err != nil {
		return // it is tried again
	}
	defer give()
	if c.current(d) {
		c.askKept(ctx, d.id, d.e, d.lease.id)
	}
}

// askKept is renewKept by who has the turn.
func (c *Volumes) askKept(ctx context.Context, id string, e *entry, lease []byte) {
	ctx, cancel := context.WithTimeout(ctx, renewLimit)
	defer cancel()
	defer c.Keys.Hold()()
	c.mu.Lock()
	v := e.spec
	c.mu.Unlock()
	since := c.generation(e)
	key, err := c.Keys.GetKey(ctx, keyclient.Request{Volume: id, LeaseID: lease, Offline: c.wants(&v)})
	if err != nil {
		c.Log.Warn("could not renew the leave to keep the key of a volume", "volume", id, "error", err)
		return
	}
	defer key.Close()
	if err := c.sameLease(ctx, e, key); err != nil {
		c.Log.Error("could not keep the key of a volume", "volume", id, "error", err)
		return
	}
	c.keepKey(ctx, id, e, key, since)
	c.mu.Lock()
	e.known.KeptNext = e.keptNext
	known := e.known.Spec.ID != ""
	c.mu.Unlock()
	if !known {
		return
	}
	if err := c.rememberKnown(e); err != nil {
		c.Log.Warn("could not keep the state of a volume", "volume", id, "error", err)
	}
}

// GiveBack closes a volume, destroys what is kept of it, and gives its lease back, for another
// machine to have it.
func (c *Volumes) GiveBack(ctx context.Context, id string) (Volume, error) {
	e := c.find(id)
	if e == nil {
		return Volume{ID: id}, node.UnknownVolume(id)
	}
	give, err := c.take(ctx, id, e)
	if err != nil {
		return c.view(e), err
	}
	defer give()
	c.reconcile(ctx, id, e)
	if isUp(e.condition.state) || e.known.Spec.ID != "" {
		// While it cannot be closed, all stays as it is.
		c.set(func() { e.givesBack = true })
		defer c.set(func() { e.givesBack = false })
		err := c.closeTaken(ctx, id, e)
		return c.view(e), err
	}
	if _, err := luks.Status(ctx, e.spec.Name); !errors.Is(err, luks.ErrNotActive) {
		// Nobody remembers who made the mapping, and it may be written.
		return c.view(e), errors.Join(failure.Newf(failure.State, "close it first", "there is a mapping /dev/mapper/%s", e.spec.Name), err)
	}
	if err := c.forgetKept(ctx, id, true); err != nil {
		return c.view(e), err
	}
	// The lease's ID went with the key. The machine gets another one, to give it back.
	defer c.Keys.Hold()()
	key, err := c.Keys.GetKey(ctx, keyclient.Request{Volume: id})
	if err != nil {
		return c.view(e), err
	}
	defer key.Close()
	if key.Lease != nil {
		err = c.Keys.Release(ctx, id, key.Lease.ID)
	}
	return c.view(e), err
}

// keepsLease reports whether a volume that is closed keeps its lease, with its key.
func (c *Volumes) keepsLease(id string, e *entry) bool {
	if c.Offline == nil || !c.Offline.Has(id) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return e.spec.Offline != nil && !e.givesBack && !e.keptNothing
}
