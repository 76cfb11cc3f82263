package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/luks"
)

// Recipient is who maps a volume in the agent's place, and wants its key for that.
type Recipient struct {
	// Give hands the key over, and is called at most once. The key is wiped when it
	// returns.
	Give func(key []byte) error
	// Gone is closed when nobody is left who could still map the volume. Nil: nobody
	// knows.
	Gone <-chan struct{}
}

const (
	// mapWithin is how long a recipient may take to map the volume. systemd-cryptsetup
	// needs well below a second after it has the key.
	mapWithin = time.Minute
	// mapLook is how often it is looked for. What is written before it is found may be
	// written under a key that the host knows.
	mapLook = 20 * time.Millisecond
	// stopLook is how long an agent that is to stop still waits for a mapping: one that
	// comes later is looked at by the next agent.
	stopLook = 10 * time.Second
)

var (
	errNotMapped = errors.New("nobody mapped the volume with the key that was handed out")
	errOtherKey  = errors.New("what was mapped is not what was checked")
	// errUnlooked leaves lease and state as they are: what comes later is compared then, by
	// WatchMapped of this agent or the next.
	errUnlooked = errors.New("a mapping may still come of the key that was handed out, and is compared then")
)

// HandOut is [Volumes.Open] for a volume that another program maps: the header is checked
// before the key leaves, and the kernel's table, the header and the key are compared with
// it when the mapping is there. A mapping that differs is taken out of use. Otherwise the
// volume is open afterwards, as if this node had mapped it itself.
//
// The key of a volume that is mapped already is not handed out: there is nothing that it
// could be for. A volume that does not exist yet is created first, and closed again for
// the recipient.
//
// A new call ends the wait of an earlier one for a mapping that does not come: systemd
// loads a credential again for each command of a unit.
func (c *Volumes) HandOut(ctx context.Context, v node.Volume, to Recipient) (Volume, error) {
	if e := c.find(v.ID); e != nil {
		c.set(func() { e.anew() })
	}
	return c.opened(ctx, v, Intent{}, func(o *opening, ctx context.Context) error { return o.handOut(ctx, to) })
}

// TakeOver is for a volume that another program may have mapped after an earlier agent
// handed its key out: one that is mapped is compared as [Volumes.HandOut] does. One that
// is not stays as it is.
func (c *Volumes) TakeOver(ctx context.Context, v node.Volume) error {
	if _, err := luks.Status(ctx, v.Name); errors.Is(err, luks.ErrNotActive) {
		return nil
	}
	_, err := c.opened(ctx, v, Intent{}, (*opening).takeOver)
	return err
}

// takeOver makes a volume open that is mapped. If a key was handed out for it and nobody
// has looked since, it is compared now. Any other mapping has to be proved as ever.
func (o *opening) takeOver(ctx context.Context) error {
	var err error
	if r, known := o.recall(o.v.ID); known && r.Sequence == 0 {
		m, wrong := luks.Status(ctx, o.v.Name)
		defer o.Keys.Hold()()
		err = o.withKeyOf(ctx, func(key *keyclient.Key) error {
			if key.State == keyclient.Active || wrong != nil {
				return o.compared(ctx, key, nil)
			}
			// It was being created, by this node, and then no key was handed out.
			if err := o.goOn(ctx, key, m); err != nil {
				return err
			}
			return o.keep(ctx, key)
		})
	} else {
		_, err = o.existing(ctx)
	}
	if err == nil {
		o.on(o.e, EventMapped, nil)
	}
	return err
}

func (o *opening) handOut(ctx context.Context, to Recipient) error {
	if o.v.Throwaway() {
		return errThrowaway
	}
	if err := o.measurable(ctx); err != nil {
		return err
	}
	if _, err := luks.Status(ctx, o.v.Name); !errors.Is(err, luks.ErrNotActive) {
		o.Log.Info("the volume is mapped already: its key would open nothing, and stays here", "volume", o.v.ID)
		return o.takeOver(ctx)
	}
	o.set(func() { o.e.known = remembered{} })
	if err := o.await(ctx); err != nil {
		return err
	}
	defer o.Keys.Hold()()
	o.unheard = true
	err := o.withKeyOf(ctx, func(key *keyclient.Key) error {
		if key.State == keyclient.Active {
			return o.give(ctx, key, to)
		}
		return o.createAndClose(ctx, key)
	})
	if err == nil && o.created {
		err = o.withKeyOf(ctx, func(key *keyclient.Key) error { return o.give(ctx, key, to) })
	}
	if err == nil {
		o.on(o.e, EventMapped, nil)
	}
	return err
}

// withKeyOf gets the key and lends it to f. If f fails and nothing is mapped, the lease
// goes back.
func (o *opening) withKeyOf(ctx context.Context, f func(*keyclient.Key) error) error {
	key, err := o.key(ctx)
	if err != nil {
		return err
	}
	defer key.Close()
	o.set(func() { o.e.lastID = key.CorrelationID })
	err = o.remember(o.state(key))
	if err == nil {
		err = f(key)
	}
	if err != nil {
		if !errors.Is(err, errUnlooked) {
			o.giveBack(ctx, key, err)
		}
		return failure.WithID(classify(err), key.CorrelationID)
	}
	return nil
}

// createAndClose creates the volume as any opening does, and leaves nothing mapped.
func (o *opening) createAndClose(ctx context.Context, key *keyclient.Key) error {
	if err := o.provision(ctx, key); err != nil {
		return err
	}
	o.drop(ctx, o.e)
	m := o.mapping
	o.mapping = luks.Mapping{}
	return luks.Close(ctx, o.closeRequest(m))
}

// give checks the header, hands the key over, and compares what comes of it.
func (o *opening) give(ctx context.Context, key *keyclient.Key, to Recipient) error {
	var h *luks.Header
	err := o.either(ctx, o.v.DevicePath(), key, o.v.ReadOnly, func(kept *luks.Header) (err error) {
		if kept != nil && key.Lease != nil && !o.v.ReadOnly { // the recipient reads what is in front
			until := luks.DeadlineIn(key.Lease.Until - keyclient.Boottime())
			if err := luks.KeepNext(ctx, o.v.DevicePath(), kept, until); err != nil { // both copies
				return err
			}
			if err := luks.PutNext(ctx, o.v.DevicePath(), kept, until); err != nil {
				return err
			}
		}
		h, err = luks.ReadHeader(ctx, headerOf(o.existingOf(key)), key.DEK)
		return err
	})
	if err != nil {
		return err
	}
	if copy, damaged := h.Damaged(); damaged {
		// The recipient reads the disk, and would repair it by rules of its own.
		return failure.Newf(failure.HeaderRefused, "keyagent restore-header "+o.v.ID+" rebuilds it", "the %s copy of the header is damaged", copy)
	}
	if err := o.clearMark(ctx); err != nil {
		return err
	}
	o.hold(o.e, key.Lease)
	o.reserve(ctx, o.e)
	if err := o.step(ctx, "handed out", func() error { return key.DEK.Use(to.Give) }); err != nil {
		o.drop(ctx, o.e)
		return fmt.Errorf("hand the key out: %w", err)
	}
	// From here on a mapping may come, whatever becomes of the caller.
	if err := o.step(ctx, "mapped", func() error { return o.awaitMapping(ctx, to.Gone) }); err != nil {
		o.drop(ctx, o.e)
		return err
	}
	return o.compared(ctx, key, h)
}

// awaitMapping waits until something is mapped under the volume's name. What looks right
// is complete with the node that udev makes, which this process must not make first: until
// then nobody uses it.
func (o *opening) awaitMapping(ctx context.Context, gone <-chan struct{}) error {
	anew := make(chan struct{})
	o.set(func() { o.e.anew = sync.OnceFunc(func() { close(anew) }) })
	return awaitMapping(ctx, gone, anew, func() (there, complete bool) {
		m, err := luks.Status(context.WithoutCancel(ctx), o.v.Name)
		if errors.Is(err, luks.ErrNotActive) {
			return false, false
		}
		return true, err != nil || exists(m.Path) // what is wrong is so without a node, too
	})
}

// awaitMapping waits within bounds, as the key and the volume's turn are held meanwhile. A
// disk that the host lets hang outlasts any: as long as somebody is there who may still map
// the volume, that is not the end of it.
func awaitMapping(ctx context.Context, gone, anew <-chan struct{}, look func() (there, complete bool)) error {
	watched := gone != nil
	limit, tick := time.NewTimer(mapWithin), time.NewTicker(mapLook)
	defer limit.Stop()
	defer tick.Stop()
	stop := ctx.Done()
	late, over := false, false // nobody will map it now; nobody waits any longer
	for {
		select {
		case <-tick.C:
		case <-gone:
			late, gone = true, nil
		case <-anew:
			late, anew = true, nil
		case <-limit.C:
			over = true
		case <-stop:
			stop = nil
			limit.Reset(stopLook)
		}
		switch there, complete := look(); {
		case complete, there && over:
			return nil
		case !there && over && watched && !late:
			return failure.New(failure.State, errUnlooked, "the journal of the unit that asked says what it waits for")
		case !there && (late || over):
			return failure.New(failure.State, errNotMapped, "the journal of the unit that asked says why")
		}
	}
}

// compared makes the volume open if the mapping is this volume's. One that is not is
// taken out of use: somebody who changed the header in between may know its key. Of a
// mapping that cannot be compared nothing is known, which is no better.
func (o *opening) compared(ctx context.Context, key *keyclient.Key, h *luks.Header) error {
	ctx = context.WithoutCancel(ctx)
	var m luks.Mapping
	err := o.either(ctx, o.v.DevicePath(), key, o.v.ReadOnly, func(kept *luks.Header) (err error) {
		as := o.existingOf(key)
		if as.Header = kept; kept != nil {
			h = kept
		}
		m, err = luks.Prove(ctx, as, key.DEK)
		return err
	})
	if err == nil {
		err = o.asDescribed(m)
	}
	if err == nil && h == nil {
		h, err = luks.ReadHeader(ctx, headerOf(o.existingOf(key)), key.DEK)
	}
	if err != nil && h == nil && failure.Of(err).Class == failure.Unreachable {
		return err // whether its key is being changed cannot be known now; it is looked at again
	}
	if err != nil {
		return o.sever(ctx, err)
	}
	o.mapping = m
	o.set(func() { o.e.header = h })
	o.keepHeader(o.v.ID, h)
	o.warn(o.e, "header", "")
	o.warn(o.e, "fence", "")
	if err := o.keep(ctx, key); err != nil {
		return err
	}
	if err := o.measureOnce(ctx); err != nil {
		o.remove(ctx, "a mapping that was made with a key of ours cannot be measured; taking it out of use", err)
		return err
	}
	return nil
}

// asDescribed holds the options of a mapping against those of the volume.
func (o *opening) asDescribed(m luks.Mapping) error {
	switch {
	case m.Suspended:
		return fmt.Errorf("%w: %s", luks.ErrSuspended, m.Name)
	case o.v.ReadOnly && !m.ReadOnly:
		return fmt.Errorf("%w: %s is writable, and read_only was asked for", luks.ErrTableMismatch, m.Name)
	case m.Discards && !o.v.Discards:
		return fmt.Errorf("%w: %s passes discards through, which the agent's configuration does not allow", luks.ErrTableMismatch, m.Name)
	}
	return nil
}

// remove takes a mapping out of use that nobody may use.
func (o *opening) remove(ctx context.Context, text string, why error) {
	o.drop(ctx, o.e)
	o.Log.Error(text, "volume", o.v.ID, "mapping", o.v.Name, "error", why)
	err := luks.Sever(ctx, o.v.Name)
	if err != nil && !errors.Is(err, luks.ErrNotActive) {
		o.Log.Error("could not take it out of use", "volume", o.v.ID, "mapping", o.v.Name, "error", err)
		o.warn(o.e, "fence", "a mapping that nobody may use has the volume's name, and could not be removed: "+err.Error())
	}
}

func (o *opening) sever(ctx context.Context, why error) error {
	o.remove(ctx, "ALARM: the mapping that was made with a key of ours is not what was checked; taking it out of use", why)
	class := failure.Tampered
	if errors.Is(why, luks.ErrIO) || errors.Is(why, luks.ErrDeviceHung) {
		class = failure.DeviceBusy // nobody knows
	}
	return failure.New(class, fmt.Errorf("%w: %w", errOtherKey, why), "do not trust what was read from it; find out who changed the disk, or compare the options of both configurations")
}
