package volume

import (
	"context"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/storage/memfs"
)

// Case 48: who writes a volume, who has to wait, and for what.
func TestOneNodeWritesAVolume(t *testing.T) {
	const long = 100 * 365 * 24 * time.Hour
	for _, tt := range []struct {
		name          string
		terms         Terms
		holder, taker *Caller
		after         time.Duration
		want          error
	}{
		{"another machine", one, caller("node-1", "tpm:1"), caller("node-2", "tpm:2"), 0, ErrHeld},
		{"another machine, years later", one, caller("node-1", "tpm:1"), caller("node-2", "tpm:2"), long, ErrHeld},
		{"the same machine", one, caller("node-1", "tpm:1"), caller("node-1", "tpm:1"), 0, nil},
		{"expiry, too early", expiring, caller("node-1", "tpm:1"), caller("node-2", "tpm:2"), 2*time.Minute - 1, ErrHeld},
		{"expiry, in time", expiring, caller("node-1", "tpm:1"), caller("node-2", "tpm:2"), 2 * time.Minute, nil},
		{"no machine, too early", one, caller("node-1", ""), caller("node-2", ""), 2*time.Minute - 1, ErrHeld},
		{"no machine, in time", one, caller("node-1", ""), caller("node-2", ""), 2 * time.Minute, nil},
		{"a machine after none, too early", one, caller("node-1", ""), caller("node-2", "tpm:2"), time.Minute, ErrHeld},
		{"a machine after none, in time", one, caller("node-1", ""), caller("node-2", "tpm:2"), 2 * time.Minute, nil},
		{"none after a machine", one, caller("node-1", "tpm:1"), caller("node-2", ""), long, ErrHeld},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			before := w.active(tt.holder, tt.terms)
			w.clock.move(tt.after)
			r, err := w.takes(tt.taker, tt.terms)
			is(t, tt.name, err, tt.want)
			if err != nil {
				if !strings.Contains(err.Error(), `volume "data-1" is written by node-1 until`) {
					t.Errorf("it is not told who: %v", err)
				}
				return
			}
			if r.Lease.ID == before.Lease.ID || r.Lease.Node != tt.taker.Node {
				t.Errorf("%+v", r.Lease)
			}
			_, _, err = w.Renew(context.Background(), "data-1", tt.holder.with(before.Lease.ID), tt.terms)
			is(t, "the one before renews", err, ErrLease)
			_, err = w.Update(context.Background(), "data-1", func(r *Record) error { return r.Release(tt.holder.with(before.Lease.ID)) })
			is(t, "the one before gives back", err, ErrLease)
		})
	}
}

func TestWhoPresentsTheLeaseKeepsIt(t *testing.T) {
	w := newWorld(t)
	c := caller("node-1", "")
	before := w.active(c, one)
	r, err := w.takes(caller("node-9", "").with(before.Lease.ID), one)
	if err != nil || r.Lease.ID != before.Lease.ID || r.Lease.Node != "node-9" || !r.Lease.Since.Equal(before.Lease.Since) {
		t.Errorf("%+v, %v", r, err)
	}
	_, err = w.takes(caller("node-9", "").with(strings.Repeat("0", 32)), one)
	is(t, "a guess", err, ErrHeld)
}

func TestAReleasedVolumeIsFree(t *testing.T) {
	w := newWorld(t)
	c := caller("node-1", "tpm:1")
	r := w.active(c, one)
	release := func(id string) error {
		_, err := w.Update(context.Background(), "data-1", func(r *Record) error { return r.Release(c.with(id)) })
		return err
	}
	is(t, "a guess", release(strings.Repeat("0", 32)), ErrLease)
	is(t, "given back", release(r.Lease.ID), nil)
	is(t, "once more", release(r.Lease.ID), nil)
	_, _, err := w.Renew(context.Background(), "data-1", c.with(r.Lease.ID), one)
	is(t, "a renewal after that", err, ErrLease)
	_, err = w.takes(caller("node-2", "tpm:2"), one)
	is(t, "the next node", err, nil)
}

// Case 48: readers wait for a writer, and leave no trace.
func TestReadersAndManyWritersHaveNoLease(t *testing.T) {
	for name, terms := range map[string]Terms{"readers": readers, "many": many} {
		w := newWorld(t)
		r := w.active(caller("node-1", "tpm:1"), one)
		_, err := w.takes(caller("node-2", "tpm:2"), terms)
		is(t, name+" beside a writer", err, ErrHeld)
		if _, err := w.Update(context.Background(), "data-1", func(r *Record) error { r.End(); return nil }); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			after, err := w.takes(caller("node-2", "tpm:2"), terms)
			if err != nil || after.Lease != nil || after.Revision != r.Revision+1 {
				t.Errorf("%s: %+v, %v", name, after, err)
			}
		}
		rec, _, err := w.Renew(context.Background(), "data-1", caller("node-2", "tpm:2").with(r.Lease.ID), terms)
		if err != nil || rec.Lease != nil {
			t.Errorf("%s renew what there is not: %+v, %v", name, rec, err)
		}
	}
	// The first format needs one writer, whatever comes after it.
	w := newWorld(t)
	if r := w.active(caller("node-1", "tpm:1"), many); r.Lease != nil {
		t.Errorf("%+v", r.Lease)
	}
}

// Case 48: a node that cannot renew gets no lease that ends by itself.
func TestAnOldNodeGetsNoLeaseThatEnds(t *testing.T) {
	for _, tt := range []struct {
		machine string
		terms   Terms
		want    error
	}{{"tpm:1", one, nil}, {"", one, ErrOldNode}, {"tpm:1", expiring, ErrOldNode}, {"", many, nil}, {"", readers, nil}} {
		w := newWorld(t)
		w.active(caller("node-1", "tpm:1"), many)
		old := caller("node-2", tt.machine)
		old.Protocol = 0
		_, err := w.takes(old, tt.terms)
		is(t, tt.machine, err, tt.want)
	}
}

// A service that is alone remembers renewals; one that is not writes them.
func TestARenewalIsRememberedOrWritten(t *testing.T) {
	for _, alone := range []bool{true, false} {
		c, disk := newClock(), memfs.New()
		w := &world{t, c, disk, newStore(t, disk, c.now, alone)}
		w.obtain()
		holder := caller("node-1", "")
		r := w.active(holder, one)
		other := w
		if !alone {
			other = &world{t, c, disk, newStore(t, disk, c.now, false)}
		}
		for range 10 {
			c.move(40 * time.Second)
			if _, _, err := w.Renew(context.Background(), "data-1", holder.with(r.Lease.ID), one); err != nil {
				t.Fatal(err)
			}
			_, err := other.takes(caller("node-2", ""), one)
			is(t, "while it is renewed", err, ErrHeld)
		}
		now, err := w.Get(context.Background(), "data-1")
		if err != nil || (now.Revision == r.Revision) != alone {
			t.Errorf("alone %v: revision %d, it was %d; %v", alone, now.Revision, r.Revision, err)
		}
		c.move(one.Term)
		if !alone {
			_, err = other.takes(caller("node-2", ""), one)
			is(t, "clocks may be apart", err, ErrHeld)
			c.move(Skew)
		}
		_, err = other.takes(caller("node-2", ""), one)
		is(t, "when it has ended", err, nil)
	}
}

// Case 48: a step of the service's clock ends no lease early: what this process granted or
// renewed ends by a clock that nobody sets.
func TestALeaseEndsByAClockThatNobodySets(t *testing.T) {
	w := &world{t, newClock(), memfs.New(), nil}
	w.Store = newStore(t, w.disk, time.Now, true)
	w.obtain()
	c := caller("node-1", "")
	r := w.active(c, one)
	for range 3 {
		if _, _, err := w.Renew(t.Context(), "data-1", c.with(r.Lease.ID), one); err != nil {
			t.Fatal(err)
		}
		r, err := w.Get(t.Context(), "data-1")
		if err != nil {
			t.Fatal(err)
		}
		if ends := w.Ends(r); !strings.Contains(ends.String(), " m=+") {
			t.Fatalf("it ends at %s, by the wall clock", ends)
		}
	}
}

// Case 48: the service starts again, and a grant has a shorter term since. A renewal
// whose answer is lost must not shorten what the holder was told before the restart.
func TestAShorterTermAfterARestartTakesNothingBack(t *testing.T) {
	w := newWorld(t)
	holder, other := caller("node-1", ""), caller("node-2", "")
	r := w.active(holder, one)
	w.clock.move(time.Hour)
	holder = holder.with(r.Lease.ID)
	if _, _, err := w.Renew(t.Context(), "data-1", holder, one); err != nil {
		t.Fatal(err)
	}
	w.Store = newStore(t, w.disk, w.clock.now, true) // knows nothing of the renewal
	short := one
	short.Term = 30 * time.Second
	if _, _, err := w.Renew(t.Context(), "data-1", holder, short); err != nil {
		t.Fatal(err)
	}
	w.clock.move(one.Term - time.Second)
	_, err := w.takes(other, one)
	is(t, "the holder may write", err, ErrHeld)
	w.Store = newStore(t, w.disk, w.clock.now, true)
	_, err = w.takes(other, one)
	is(t, "after one more restart", err, ErrHeld)
	w.clock.move(time.Minute)
	_, err = w.takes(other, one)
	is(t, "its time is up", err, nil)
}

// Case 48: after a restart nobody knows of the renewals before it.
func TestAfterARestartALeaseLivesForAnotherTerm(t *testing.T) {
	w := newWorld(t)
	holder := caller("node-1", "")
	r := w.active(holder, one)
	w.clock.move(time.Hour) // renewed all the time, as far as the record does not know
	again := &world{t, w.clock, w.disk, newStore(t, w.disk, w.clock.now, true)}
	w.clock.move(one.Term - time.Second)
	_, err := again.takes(caller("node-2", ""), one)
	is(t, "just after the restart", err, ErrHeld)
	if _, _, err := again.Renew(context.Background(), "data-1", holder.with(r.Lease.ID), one); err != nil {
		t.Fatal(err)
	}
	w.clock.move(one.Term - time.Second)
	_, err = again.takes(caller("node-2", ""), one)
	is(t, "renewed since", err, ErrHeld)
	w.clock.move(time.Second)
	_, err = again.takes(caller("node-2", ""), one)
	is(t, "not renewed", err, nil)
}

// Case 48: an operator's word ends a lease at once.
func TestAnOperatorEndsALease(t *testing.T) {
	w := newWorld(t)
	c := caller("node-1", "tpm:1")
	r := w.active(c, one)
	var ended Holder
	if _, err := w.Update(context.Background(), "data-1", func(r *Record) error { ended, _ = r.End(); return nil }); err != nil || ended != c.Holder {
		t.Fatalf("%+v, %v", ended, err)
	}
	_, err := w.takes(caller("node-2", "tpm:2"), one)
	is(t, "the next node", err, nil)
	_, _, err = w.Renew(context.Background(), "data-1", c.with(r.Lease.ID), one)
	is(t, "the one before", err, ErrLease)
}

// Case 64: what storage lost is accepted by name only, and is newer than all that was.
func TestARestoredRecordIsAcceptedByAnOperatorsWord(t *testing.T) {
	w := newWorld(t)
	c := caller("node-1", "tpm:1")
	backup, _, err := w.disk.Get(context.Background(), "volumes/data-1")
	if err != nil {
		t.Fatal(err)
	}
	r := w.active(c, one)
	_, version, err := w.disk.Get(context.Background(), "volumes/data-1")
	if err == nil {
		_, err = w.disk.Put(context.Background(), "volumes/data-1", backup, version)
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Get(context.Background(), "data-1")
	is(t, "an older record", err, ErrRollback)
	list, err := w.Restored(context.Background())
	if err != nil || len(list) != 1 || list[0] != (Restored{"data-1", r.Revision, 1, Pending}) {
		t.Errorf("%+v, %v", list, err)
	}
	got, seen, err := w.Accept(context.Background(), "data-1")
	if err != nil || seen != r.Revision || got.Revision != seen+1 || got.State != Pending {
		t.Errorf("%+v, %d, %v", got, seen, err)
	}
	if got, err = w.Get(context.Background(), "data-1"); err != nil || got.Revision != seen+1 {
		t.Errorf("%+v, %v", got, err)
	}
	if list, err = w.Restored(context.Background()); err != nil || len(list) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
	if again, _, err := w.Accept(context.Background(), "data-1"); err != nil || again.Revision != got.Revision {
		t.Errorf("%+v, %v", again, err)
	}
	if _, err := hex.DecodeString(NewID()); err != nil {
		t.Error(err)
	}
}
