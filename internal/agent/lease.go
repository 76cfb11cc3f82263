package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/luks"
)

// lease is the right to write a volume, as this node keeps it.
type lease struct {
	id    []byte
	term  time.Duration
	until time.Duration // by keyclient.Boottime
	bound bool
	next  time.Duration // when it is renewed, or tried again
	lost  bool
}

// The parts of a lease's term: it is renewed when a third has passed, and a holder
// that is bound stops writing when a quarter is left.
const (
	renewAfter  = 3
	marginPart  = 4
	renewPause  = 5 * time.Second
	renewLimit  = 25 * time.Second // of an attempt that nothing hurries: a refusal is made sure of by another attestation
	releaseWait = 5 * time.Second
)

// Leases are given back when systemd stops, which it measures before it unmounts anything:
// no profile accepts what the machine is then. So there is a session from before, soon
// after the first lease and as long as there is one, whose verdict outlives the time to the
// next look.
const (
	firstSession = 5 * time.Second // volumes that are still being opened come first
	lookSession  = 30 * time.Second
	sessionLeft  = 3 * lookSession
)

// margin is how long before its end a bound holder stops writing. Stopping takes a
// moment, and the other clock is not this one.
func (l *lease) margin() time.Duration { return l.term / marginPart }

// hold begins to renew a lease. Nil is none.
func (c *Volumes) hold(e *entry, k *keyclient.Lease) {
	var l *lease
	if k != nil {
		l = &lease{id: k.ID, term: k.Term, until: k.Until, bound: k.Bound, next: k.Until - k.Term + soon(k.Term/renewAfter)}
		if k.Rotate { // what the key service has to say about that comes with a renewal
			l.next = keyclient.Boottime()
		}
	}
	c.set(func() { e.lease, e.verdict = l, verdict{heard: keyclient.Boottime(), asking: e.verdict.asking} })
	c.warn(e, "lease", "")
	c.warn(e, "verdict", "")
}

// resumeLease goes on with a lease that an earlier process had, and has it renewed
// at once.
func (c *Volumes) resumeLease(e *entry, r remembered) {
	if len(r.LeaseID) == 0 || e.lease != nil {
		return
	}
	c.set(func() {
		e.lease = &lease{id: r.LeaseID, term: r.LeaseTerm, until: r.LeaseUntil, bound: r.Bound, next: keyclient.Boottime()}
		e.keptNext = r.KeptNext
	})
	if r.Offline != nil {
		c.offlineNow(r.Spec.ID, e, *r.Offline, 0)
	}
}

// sameLease refuses a new lease for a volume of which this process had another one: in
// between another node may have had it, and changed what is below the mapping here.
func (c *Volumes) sameLease(ctx context.Context, e *entry, k *keyclient.Key) error {
	c.mu.Lock()
	l := e.lease
	c.mu.Unlock()
	if l == nil || k.Lease == nil || bytes.Equal(l.id, k.Lease.ID) {
		return nil
	}
	c.release(context.WithoutCancel(ctx), k.Volume, k.Lease.ID)
	return errInBetween
}

var errInBetween = failure.Newf(failure.Held, "close it here, and open it again", "another node may have had the volume in between: the lease of this one had ended")

// drop ends the renewals, and gives the disk's reservation back.
func (c *Volumes) drop(ctx context.Context, e *entry) {
	var unreserve func() error
	c.set(func() { unreserve, e.lease, e.unreserve = e.unreserve, nil, nil })
	if unreserve == nil {
		return
	}
	if err := unreserve(); err != nil {
		c.Log.WarnContext(ctx, "could not release the disk's reservation", "volume", e.spec.ID, "error", err)
	}
}

// reserve holds the disk's write-exclusive reservation with the lease, where the
// disk has such a thing: then even a machine that was frozen past its lease cannot
// write. The key service says who the writer is, so what another machine reserved
// before is cleared.
func (c *Volumes) reserve(ctx context.Context, e *entry) {
	c.mu.Lock()
	l, device, have := e.lease, e.spec.DevicePath(), e.unreserve != nil
	c.mu.Unlock()
	if l == nil || have || e.spec.ReadOnly {
		return
	}
	sum := sha256.Sum256(l.id)
	key := binary.BigEndian.Uint64(sum[:]) | 1 // never zero
	release, err := luks.Reserve(ctx, device, key)
	if errors.Is(err, luks.ErrReserved) {
		c.Log.Warn("another machine has reserved the disk; taking the reservation over with the lease", "volume", e.spec.ID)
		release, err = luks.Seize(ctx, device, key)
	}
	switch {
	case errors.Is(err, luks.ErrNoReservations):
		return
	case err != nil:
		c.warn(e, "reservation", "the disk could not be reserved: "+err.Error())
		c.Log.Warn("could not reserve the disk", "volume", e.spec.ID, "error", err)
		return
	}
	c.set(func() { e.unreserve = release })
}

// release gives a lease back, if the service answers soon. If not, this machine
// takes it up again, or it ends by itself.
func (c *Volumes) release(ctx context.Context, id string, leaseID []byte) {
	if len(leaseID) == 0 {
		return
	}
	if err := c.forgetKept(ctx, id, true); err != nil {
		return // the lease stays with the key: it may still open the volume here
	}
	ctx, cancel := context.WithTimeout(ctx, releaseWait)
	defer cancel()
	if err := c.Keys.Release(ctx, id, leaseID); err != nil {
		c.Log.Warn("could not give the lease back; it goes on until it ends, or this machine takes it up again", "volume", id, "error", err)
	}
}

// leased reports whether this process has the lease of a volume to renew that is open, or
// on its way there, or the verdict on an open one. What came from the initrd is, until its
// proof is refused.
func (c *Volumes) leased() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		switch s := e.condition.state; {
		case s == Failed, s == Absent, e.lease != nil && e.lease.lost:
		case e.lease != nil, isUp(s) && e.known.UUID != "" && !e.spec.Throwaway():
			return true
		}
	}
	return false
}

// due is a lease that has to be looked at.
type due struct {
	id    string
	e     *entry
	lease lease
	// unproved: it came from the initrd, and this system has not proved anything yet.
	unproved bool
	sequence uint64 // of the mapping
}

// current reports whether a renewal is still about the mapping and the lease that the entry has:
// it may have been closed, and opened again, while the key service was asked.
func (c *Volumes) current(d due) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.currentLocked(d)
}

func (c *Volumes) currentLocked(d due) bool {
	l := d.e.lease
	return d.e.known.Sequence == d.sequence && (l == nil) == (d.lease.id == nil) && (l == nil || bytes.Equal(l.id, d.lease.id))
}

// KeepLeases renews leases until ctx ends, each in its own time, and keeps the session on
// which they go back.
func (c *Volumes) KeepLeases(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	look := time.Now().Add(firstSession)
	for {
		var now time.Time
		select {
		case <-ctx.Done():
			return
		case now = <-tick.C:
		}
		switch {
		case !c.holdsLease():
			look = now.Add(firstSession)
		case !now.Before(look):
			look = now.Add(lookSession)
			go func() {
				// Renewals say aloud what is wrong.
				if err := c.Keys.KeepSession(ctx, sessionLeft); err != nil {
					c.Log.Debug("there is no session on which leases could be given back", "error", err)
				}
			}()
		}
		for _, d := range c.dueLeases(keyclient.Boottime()) {
			go c.renew(ctx, d)
		}
		for _, d := range c.dueVerdicts(keyclient.Boottime()) {
			go c.askVerdict(ctx, d)
		}
		for _, d := range c.dueKept(keyclient.Boottime()) {
			go c.renewKept(ctx, d)
		}
	}
}

// holdsLease says whether there is a lease that is this node's to give back.
func (c *Volumes) holdsLease() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		if l := e.lease; l != nil && !l.lost {
			return true
		}
	}
	return false
}

// dueLeases returns what has to be done now, and puts off its next turn.
func (c *Volumes) dueLeases(now time.Duration) []due {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []due
	for id, e := range c.entries {
		l := e.lease
		if l == nil || l.lost || now < l.next {
			continue
		}
		l.next = now + min(renewPause, l.term/(2*renewAfter))
		out = append(out, due{id, e, *l, e.known.Initrd && !c.Initrd, e.known.Sequence})
	}
	slices.SortFunc(out, func(a, b due) int { return int(a.lease.until - b.lease.until) })
	return out
}

// renew tries once. A bound holder whose time is nearly up stops writing first, and so
// does one that has not proved that it may write.
func (c *Volumes) renew(ctx context.Context, d due) {
	if d.lease.bound && keyclient.Boottime() >= d.lease.until-d.lease.margin() {
		c.fence(ctx, d, fmt.Sprintf("its lease could not be renewed and ends in %s", (d.lease.until-keyclient.Boottime()).Round(time.Second)))
	}
	if d.unproved {
		c.warn(d.e, "lease", "its lease is not renewed: the initrd opened the volume, and this system has not proved yet that it may have it")
		return
	}
	if !c.begin(d.e) {
		return
	}
	limit := renewLimit
	if d.lease.bound {
		limit = max(time.Second, min(renewPause, d.lease.until-d.lease.margin()-keyclient.Boottime()))
	}
	callCtx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	got, err := c.Keys.Renew(callCtx, d.id, d.lease.id)
	c.end(d.e)
	switch {
	case !c.current(d):
		if refuses(failure.Of(err).Class) { // whatever became of the mapping; a lease of before says nothing
			c.heard(ctx, d.id, err)
		}
		return
	case err == nil && got == nil:
		c.drop(ctx, d.e)
		_ = c.forgetKept(ctx, d.id, true) // others may write it from now on; it says so itself
		c.judged(ctx, due{id: d.id, e: d.e, sequence: d.sequence}, nil)
		return
	case err == nil:
		c.renewed(ctx, d, got)
		return
	}
	defer c.heard(ctx, d.id, err) // when all else is done
	if ctx.Err() != nil {
		return
	}
	if lostLease(err) {
		c.cut(ctx, d, err)
		return
	}
	c.warn(d.e, "lease", "the lease could not be renewed: "+err.Error())
	c.Log.Warn("could not renew a lease", "volume", d.id, "bound", d.lease.bound, "ends_in", (d.lease.until - keyclient.Boottime()).Round(time.Second), "error", err)
	c.judged(ctx, d, err)
}

// lostLease says that the key service gave the volume to another node, or ended its life.
func lostLease(err error) bool {
	class := failure.Of(err).Class
	return class == failure.Held || class == failure.State
}

// renewed takes over what the key service granted, and resumes a volume that had
// to wait for it.
func (c *Volumes) renewed(ctx context.Context, d due, k *keyclient.Lease) {
	c.mu.Lock()
	l := d.e.lease
	current := c.currentLocked(d)
	if current {
		l.id, l.term, l.until, l.bound, l.next = k.ID, k.Term, k.Until, k.Bound, k.Until-k.Term+soon(k.Term/renewAfter)
		r := &d.e.known
		r.LeaseID, r.LeaseTerm, r.LeaseUntil, r.Bound = k.ID, k.Term, k.Until, k.Bound
		d.lease.id = k.ID
	}
	delete(d.e.warnings, "lease")
	known := d.e.known
	c.mu.Unlock()
	if current && known.UUID != "" {
		if err := c.rememberKnown(d.e); err != nil {
			c.Log.Warn("could not keep the state of a volume", "volume", d.id, "error", err)
		}
	}
	c.mu.Lock()
	untidy := known.KeyVersion > 1 && !d.e.tidy
	c.mu.Unlock()
	switch {
	case !current || known.Spec.ReadOnly:
	case k.Rotate || untidy:
		go c.rotateSoon(ctx, d.id, d.e)
	default:
		c.warn(d.e, "rotation", "")
	}
	if current {
		c.judged(ctx, d, nil)
	}
}

// fence stops all writing to a volume for now: its lease may be over. What waits
// goes on when the lease is renewed. It does not wait for the volume's turn, whose
// holder may wait for the disk.
func (c *Volumes) fence(ctx context.Context, d due, why string) {
	name, uuid, already := c.fencing(d.e)
	if uuid == "" {
		return
	}
	if already {
		// By what is known here. The kernel's word is what counts.
		if m, err := luks.Status(ctx, name); err != nil || m.Suspended {
			return
		}
	}
	c.Log.Error("suspending a volume", "volume", d.id, "why", why)
	c.set(func() { d.e.fences++ })
	c.withhold(d.e, true) // first, so that a volume is never found suspended without a reason
	err := luks.Suspend(luks.WithPatience(ctx, c.DeviceWait), name, uuid)
	if err != nil && !errors.Is(err, luks.ErrNotActive) {
		c.Log.Error("could not suspend a volume whose lease is over", "volume", d.id, "error", err)
		c.warn(d.e, "fence", "its lease is over and it could not be suspended: "+err.Error())
		// One of two mappings may be: a renewal has to let it go on.
		if m, statusErr := luks.Status(ctx, name); statusErr == nil && m.Suspended {
			c.on(d.e, EventSuspend, nil)
		}
		return
	}
	c.warn(d.e, "fence", "suspended: "+why)
	c.mu.Lock()
	failed := d.e.condition.state == Failed
	c.mu.Unlock()
	if !failed { // one that is mapped and no more stays what it is
		c.on(d.e, EventSuspend, nil)
	}
}

// withhold remembers whether a volume is suspended because this machine may not have it.
func (c *Volumes) withhold(e *entry, withheld bool) {
	c.mu.Lock()
	changed := e.known.Withheld != withheld && e.known.Spec.ID != ""
	e.known.Withheld = withheld && e.known.Spec.ID != ""
	c.mu.Unlock()
	if !changed {
		return
	}
	if err := c.rememberKnown(e); err != nil {
		c.Log.Warn("could not keep the state of a volume", "volume", e.spec.ID, "error", err)
	}
}

// cut ends all I/O of a volume that another node has, or whose life ended: what was not
// written is lost here, as it would be if this machine had died, and never reaches the disk.
func (c *Volumes) cut(ctx context.Context, d due, why error) {
	c.mu.Lock()
	name, uuid := d.e.spec.Name, d.e.known.UUID
	if !c.currentLocked(d) || uuid == "" {
		c.mu.Unlock()
		return
	}
	if l := d.e.lease; l != nil {
		l.lost = true
	}
	c.mu.Unlock()
	reason := "another node has it"
	if failure.Of(why).Class == failure.State {
		reason = "its life ended"
	}
	c.Log.Error("cutting a volume off its disk: "+reason, "volume", d.id, "error", why)
	err := luks.Cut(luks.WithPatience(ctx, c.DeviceWait), name, uuid)
	if err != nil && !errors.Is(err, luks.ErrNotActive) {
		c.Log.Error("could not cut off a volume that another node has", "volume", d.id, "error", err)
	} else {
		c.Log.Info("the volume is cut off its disk", "volume", d.id)
	}
	c.warn(d.e, "fence", "cut off its disk: "+reason+"; close it here")
	c.set(func() { d.e.lastErr = why })
	c.on(d.e, EventFail, why)
}

func (c *Volumes) fencing(e *entry) (name, uuid string, already bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return e.spec.Name, e.known.UUID, e.condition.state == Suspended
}

// leaseText is the lease as status shows it. The lock is held.
func (e *entry) leaseText() string {
	switch l := e.lease; {
	case l == nil:
		return "none"
	case l.lost:
		return "lost"
	case l.bound:
		return "bound"
	}
	return "held"
}
