package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/filesystem"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/measured"
	"github.com/keyagent/keyagent/internal/mount"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/luks"
)

// Intent is what a caller of [Volumes.Open] wants beyond what the volume says.
type Intent struct {
	// Format creates the volume if it does not exist.
	Format bool
	// From is what it then begins with, in place of what the volume says. Nil: as that
	// says.
	From *node.Image
	// Dynamic says that no configuration names the volume.
	Dynamic bool
	// NoWait does not wait for a disk that is not there.
	NoWait bool
	// Mapped takes up what is mapped, and maps nothing.
	Mapped bool
}

// Open opens a volume, and mounts it where it says. A volume that does not exist
// is created on a blank device if the intent or the volume itself says so. Opening
// an open volume succeeds.
func (c *Volumes) Open(ctx context.Context, v node.Volume, in Intent) (Volume, error) {
	if in.From != nil {
		v.From = in.From
	}
	return c.opened(ctx, v, in, (*opening).run)
}

// opened brings a volume up by way of run, which may have another program map it.
func (c *Volumes) opened(ctx context.Context, v node.Volume, in Intent, run func(*opening, context.Context) error) (Volume, error) {
	if err := v.Validate(); err != nil {
		return Volume{ID: v.ID}, failure.New(failure.Usage, err, "")
	}
	if wanted := v; in.Format {
		wanted.Format = true
		if err := wanted.Validate(); err != nil {
			return Volume{ID: v.ID}, failure.New(failure.Usage, err, "")
		}
	}
	e, err := c.claim(v, in.Dynamic)
	if err != nil {
		return Volume{ID: v.ID}, err
	}
	give, err := c.take(ctx, v.ID, e)
	if err != nil {
		return c.view(e), err
	}
	defer give()
	if err := c.allowed(e, EventOpen); err != nil {
		return c.view(e), err
	}
	started := time.Now()
	o := &opening{Volumes: c, e: e, v: v, intent: in}
	o.intent.Format = in.Format || v.Format
	err = classify(run(o, luks.WithPatience(ctx, c.DeviceWait)))
	c.finish(o, err)
	if err != nil {
		f := failure.Of(err)
		c.Log.Error("volume is not open", "volume", v.ID, "error", err, "class", f.Class, "correlation_id", f.CorrelationID)
		return c.view(e), err
	}
	c.Log.Info("volume is open", "volume", v.ID, "mount", v.Mount, "created", o.created, "took", time.Since(started))
	return c.view(e), nil
}

// finish records how an opening ended.
func (c *Volumes) finish(o *opening, err error) {
	known := false
	c.set(func() {
		o.e.lastErr, o.e.created, o.e.known.Failed = err, o.created, ""
		if err != nil && !o.stays {
			o.e.known.Failed = err.Error()
		}
		known = o.e.known.Spec.ID != ""
	})
	if known {
		// For another process that shows it, and for the next agent.
		if keepErr := c.rememberKnown(o.e); keepErr != nil {
			c.Log.Warn("could not keep the state of a volume", "volume", o.v.ID, "error", keepErr)
		}
	}
	switch {
	case o.stays:
		c.suspended(o.e, o.mapping)
	case err != nil:
		c.on(o.e, EventFail, err)
	case o.v.Mount != "" || o.v.Kind == node.Swap:
		c.on(o.e, EventMounted, nil)
	}
}

// opening is one run of Open.
type opening struct {
	*Volumes
	e       *entry
	v       node.Volume
	intent  Intent
	mapping luks.Mapping
	created bool
	left    *luks.FilesystemMark // of an attempt whose mkfs, or copy, is unfinished
	tags    bool                 // a volume that is made here has integrity
	fresh   bool                 // its tags are laid out
	cloned  bool                 // a volume that is made here has its source's data
	initrd  bool                 // it came from the initrd
	unheard bool                 // the key that is kept will do, if no key service answers
	kept    *keptUse             // it was used
	before  time.Duration        // the last verdict before that, as verdict.heard has it
	stays   bool                 // it is suspended, and stays so
	measure measuring
}

func (o *opening) run(ctx context.Context) error {
	if o.v.Throwaway() {
		return o.throwaway(ctx)
	}
	if err := o.measurable(ctx); err != nil {
		return err
	}
	there, err := o.existing(ctx)
	if err != nil {
		return err
	}
	if !there && o.intent.Mapped {
		return luks.ErrNotActive
	}
	if !there {
		if err := o.unlock(ctx); err != nil {
			return err
		}
	}
	o.on(o.e, EventMapped, nil)
	return o.mount(ctx)
}

// existing looks for a mapping of the volume's name. One that this node made is
// taken as it is; of any other it must be proved that it has the volume's key.
func (o *opening) existing(ctx context.Context) (bool, error) {
	m, err := luks.Status(ctx, o.v.Name)
	if errors.Is(err, luks.ErrNotActive) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if o.v.Integrity != "" && m.Integrity == "" && !m.Cut {
		return false, fmt.Errorf("%w: %s", luks.ErrNoIntegrity, m.Name)
	}
	r, known := o.recall(o.v.ID)
	if m.Cut {
		return false, failure.New(failure.State, errCut, "keyagent close it, then open it again")
	}
	if known && o.ours(m, r) && r.lost() {
		return false, o.clear(ctx, m, r)
	}
	if err := o.sameDevice(m); err != nil {
		return false, err
	}
	if known && o.ours(m, r) && !m.Suspended && r.Initrd == o.Initrd && o.isMeasured(r) {
		h := o.keptHeader(r)
		o.set(func() {
			r.Withheld = r.Withheld || r.is(o.e.known) && o.e.known.Withheld // it may be suspended right now
			if o.e.known = r; o.e.header == nil {
				o.e.header = h
			}
		})
		o.mapping = m
		// Another process of this node may have made it, one that ended since: nobody
		// would renew its lease.
		o.resumeLease(o.e, r)
		o.reserve(ctx, o.e)
		return true, nil
	}
	return true, o.adopt(ctx, m, r)
}

var errCut = errors.New("the volume was cut off its disk, since another node has it")

// ours reports whether a mapping is the very one that was remembered.
func (o *opening) ours(m luks.Mapping, r remembered) bool {
	return r.UUID == m.UUID && r.Device == m.DataDevice && r.Sequence != 0 && r.Sequence == sequence(m.Device)
}

// adopt takes over a mapping that somebody else may have made, once it is proved
// that it has the volume's key, or resumes one of ours that is suspended.
func (o *opening) adopt(ctx context.Context, m luks.Mapping, r remembered) error {
	defer o.Keys.Hold()()
	key, err := o.key(ctx)
	if err != nil {
		if m.Suspended && o.ours(m, r) {
			// It waits for a better verdict, and its lease is renewed meanwhile. Or somebody let
			// it go on while the key service was asked.
			if now, statusErr := luks.Status(ctx, o.v.Name); statusErr == nil {
				m = now
			}
			if again, ok := o.recall(o.v.ID); ok && again.is(r) {
				r = again
			}
			o.stays, o.mapping = true, m
			o.set(func() { o.e.known = r })
			o.resumeLease(o.e, r)
		}
		return err
	}
	defer key.Close()
	if l := key.Lease; l != nil && o.ours(m, r) && len(r.LeaseID) > 0 && !bytes.Equal(l.ID, r.LeaseID) {
		// What this mapping has not written yet is of before, and is not to be written.
		o.release(context.WithoutCancel(ctx), o.v.ID, l.ID)
		o.set(func() { o.e.known = r })
		if m.Suspended {
			if err := luks.Cut(ctx, m.Name, m.UUID); err != nil {
				return errors.Join(errInBetween, err)
			}
			o.Log.Info("the volume is cut off its disk", "volume", o.v.ID)
		}
		return errInBetween
	}
	o.initrd = o.ours(m, r) && (r.Initrd || r.FromInitrd)
	switch {
	case key.State != keyclient.Active:
		err = o.goOn(ctx, key, m)
	case m.Suspended:
		err = o.either(ctx, o.v.DevicePath(), key, o.v.ReadOnly, func(kept *luks.Header) (err error) {
			as := o.existingOf(key)
			as.Header = kept
			o.mapping, err = luks.Resume(ctx, as, key.DEK)
			return err
		})
	default:
		err = o.activateEither(ctx, key)
	}
	if err != nil {
		o.giveBack(ctx, key, err)
		return failure.WithID(classify(err), key.CorrelationID)
	}
	o.measure.done = r.Measured
	switch {
	case o.ours(m, r) && r.Initrd:
		o.Log.Info("took over a mapping from the initrd; it has the volume's key", "volume", o.v.ID, "mapping", m.Name)
	case !o.ours(m, r):
		o.Log.Warn("took over a mapping that this node did not remember; it has the volume's key", "volume", o.v.ID, "mapping", m.Name)
	}
	o.warn(o.e, "fence", "")
	if err := o.keep(ctx, key); err != nil {
		return err
	}
	// The mark of its first format, if that was cut off at its very end.
	if err := o.clearMark(ctx); err != nil {
		return err
	}
	return o.measureOnce(ctx)
}

// goOn takes up a first format that was cut off while the volume was mapped. The
// mapping is one of this volume, or it is nobody's business here.
func (o *opening) goOn(ctx context.Context, key *keyclient.Key, m luks.Mapping) error {
	if key.State == keyclient.Pending {
		return fmt.Errorf("%w: %s is mapped, and the volume has no header yet", luks.ErrNotOurs, m.Name)
	}
	switch {
	case m.UUID != key.UUID:
		return fmt.Errorf("%w: %s", luks.ErrNotOurs, m.Name)
	case m.Integrity == "": // of one that was not wiped yet, nothing can be read
		if _, err := luks.Prove(ctx, o.existingOf(key), key.DEK); err != nil {
			return err
		}
	}
	if err := luks.Close(ctx, o.closeRequest(m)); err != nil {
		return err
	}
	return o.provision(ctx, key)
}

func (o *opening) existingOf(k *keyclient.Key) luks.Existing {
	return luks.Existing{Device: o.v.DevicePath(), Name: o.v.Name, Identity: identity(k), MACs: luksMACs(k.MACs)}
}

func (o *opening) options() luks.OpenOptions {
	return luks.OpenOptions{ReadOnly: o.v.ReadOnly, AllowDiscards: o.v.Discards, NoJournal: o.v.NoJournal}
}

// unlock gets the key and maps the volume. The key lives no longer than this call.
func (o *opening) unlock(ctx context.Context) error {
	o.set(func() { o.e.known = remembered{} }) // nothing is mapped, whatever was before
	if err := o.await(ctx); err != nil {
		return err
	}
	defer o.Keys.Hold()()
	o.unheard = true
	key, err := o.key(ctx)
	if err != nil {
		return err
	}
	defer key.Close()
	o.set(func() { o.e.lastID = key.CorrelationID })
	if err := o.remember(o.state(key)); err != nil {
		o.giveBack(ctx, key, err)
		return err
	}
	if key.State == keyclient.Active {
		err = o.openActive(ctx, key)
	} else {
		err = o.provision(ctx, key)
	}
	if err != nil {
		o.giveBack(ctx, key, err)
		return failure.WithID(classify(err), key.CorrelationID)
	}
	if err := o.keep(ctx, key); err != nil {
		return err
	}
	if o.created && key.Lease != nil && o.wants(&o.v) != (keyclient.OfflineLimits{}) {
		o.askKept(ctx, o.v.ID, o.e, key.Lease.ID) // at the moment of the boot at which the next one opens it
	}
	return o.measureOrClose(ctx)
}

// key asks for the key of an existing volume. If there is none and the intent is
// to create it, it asks the key service to begin that.
func (o *opening) key(ctx context.Context) (key *keyclient.Key, err error) {
	r := keyclient.Request{Volume: o.v.ID, ReadOnly: o.v.ReadOnly, Offline: o.wants(&o.v)}
	if known, ok := o.recall(o.v.ID); ok {
		r.LeaseID = known.LeaseID
	}
	if o.Offline != nil && o.v.Offline != nil {
		if use, ok := o.Offline.Used(ctx, o.v.ID); ok {
			o.Keys.Report(o.v.ID, use.Report()) // of boots that ended before the key service answered
		}
	}
	since := o.generation(o.e)
	err = o.step(ctx, "key", func() error {
		key, err = o.Keys.GetKey(ctx, r)
		if o.unheard && r.Offline != (keyclient.OfflineLimits{}) && failure.Of(err).Class == failure.Unreachable {
			kept, keptErr := o.openKept(ctx)
			if keptErr == nil {
				key, err = kept, nil
				return nil
			}
			o.Log.Error("no key service answers, and no key that was kept opens the volume", "volume", o.v.ID, "error", keptErr)
			err = &failure.Error{Class: failure.Unreachable, Hint: failure.Of(err).Hint, Err: fmt.Errorf("%w; without it: %w", err, keptErr)}
		}
		if class := failure.Of(err).Class; err != nil && o.intent.Format && (class == failure.NotFound || class == failure.State) {
			// Before the key service is told of an attempt to write to it.
			if err = luks.Fits(ctx, o.v.DevicePath()); err == nil {
				err = o.imageFits(ctx)
			}
			if err != nil {
				return err
			}
			r.Format = true
			key, err = o.Keys.GetKey(ctx, r)
		}
		return err
	})
	if err == nil && o.kept == nil {
		// Before anything is mapped: the lease of what was kept before may have ended.
		o.keepKey(ctx, o.v.ID, o.e, key, since)
	}
	if err == nil && o.v.Measure {
		// Now: a first format wipes the DEK long before it is done.
		if o.measure.event, err = measured.Of(key.DEK, o.v.Name, key.UUID); err != nil {
			o.giveBack(ctx, key, err)
			return nil, errors.Join(err, key.Close())
		}
	}
	return key, err
}

// openActive maps a volume that holds data.
func (o *opening) openActive(ctx context.Context, key *keyclient.Key) error {
	if err := o.step(ctx, "mapped", func() error { return o.activateEither(ctx, key) }); err != nil {
		return err
	}
	// A crash right after the volume became active may have left its mark, which
	// must not outlive the first mount.
	return o.clearMark(ctx)
}

// clearMark removes the mark of a mkfs, and what is kept of a clone's source, from a volume
// that holds data by now.
func (o *opening) clearMark(ctx context.Context) error {
	if o.v.ReadOnly {
		return nil
	}
	return errors.Join(luks.ClearFilesystemMark(ctx, o.v.DevicePath()), luks.ForgetSource(ctx, o.v.DevicePath()))
}

// activateEither is activate of a volume whose key may be being changed.
func (o *opening) activateEither(ctx context.Context, key *keyclient.Key) error {
	return o.either(ctx, o.v.DevicePath(), key, o.v.ReadOnly, func(kept *luks.Header) error { return o.activateBy(ctx, key, kept) })
}

func (o *opening) activate(ctx context.Context, key *keyclient.Key) error {
	return o.activateBy(ctx, key, nil)
}

// activateBy maps the volume by the header in front, or by one that was read already.
func (o *opening) activateBy(ctx context.Context, key *keyclient.Key, by *luks.Header) error {
	m, h, err := luks.Open(ctx, luks.OpenRequest{
		Device: o.v.DevicePath(), Name: o.v.Name, Identity: identity(key), MACs: luksMACs(key.MACs), Header: by, Options: o.options(),
		Integrity: luks.Integrity(o.v.Integrity), FreshTags: o.fresh,
	}, key.DEK)
	if err != nil {
		return err
	}
	o.mapping = m
	o.set(func() { o.e.header = h })
	o.keepHeader(o.v.ID, h)
	if copy, damaged := h.Damaged(); damaged {
		text := fmt.Sprintf("the %s copy of the header is damaged; the other one was used", copy)
		o.warn(o.e, "header", text)
		o.Log.Error(text, "volume", o.v.ID, "hint", "keyagent restore-header "+o.v.ID+" rebuilds it; look after the disk")
	} else {
		o.warn(o.e, "header", "")
	}
	return nil
}

// state is what is remembered of the volume.
func (o *opening) state(key *keyclient.Key) remembered {
	r := remembered{
		Spec: o.v, Dynamic: o.e.dynamic, Initrd: o.Initrd, FromInitrd: o.Initrd || o.initrd, UUID: key.UUID, Generation: key.Generation, KeyVersion: key.KeyVersion, MACs: key.MACs,
		Device: o.mapping.DataDevice, Disk: diskSequence(o.mapping.DataDevice), Sequence: sequence(o.mapping.Device), Measured: o.measure.done,
		Offline: o.kept, KeptNext: o.e.keptNext,
	}
	if l := key.Lease; l != nil {
		r.LeaseID, r.Bound, r.LeaseTerm, r.LeaseUntil = l.ID, l.Bound, l.Term, l.Until
	}
	return r
}

// keep remembers a mapping that stands, and begins to renew its lease.
func (o *opening) keep(ctx context.Context, key *keyclient.Key) error {
	r := o.state(key)
	o.set(func() { o.e.known, o.e.tidy = r, false })
	o.hold(o.e, key.Lease)
	o.warn(o.e, "offline", "")
	if o.kept != nil {
		o.offlineNow(o.v.ID, o.e, *o.kept, o.before)
	}
	o.reserve(ctx, o.e)
	return o.rememberKnown(o.e)
}

// giveBack returns the lease of a volume that did not come to be open here.
func (o *opening) giveBack(ctx context.Context, key *keyclient.Key, why error) {
	if key.Lease == nil {
		return
	}
	alien := errors.Is(why, luks.ErrNotOurs) || errors.Is(why, luks.ErrNameTaken)
	if _, err := luks.Status(ctx, o.v.Name); !errors.Is(err, luks.ErrNotActive) && !alien {
		return // the volume is mapped: its lease goes with the mapping
	}
	if !alien {
		if err := o.closeBelow(context.WithoutCancel(ctx), o.v.Name, key.UUID); err != nil {
			o.Log.Warn("something of a volume is left that did not come to be open; its lease ends by itself", "volume", o.v.ID, "error", err)
			return
		}
	}
	if o.kept == nil { // else the lease stays here, with the key that is kept
		o.release(context.WithoutCancel(ctx), o.v.ID, key.Lease.ID)
	}
	if err := o.forget(o.v.ID); err != nil {
		o.Log.Warn("could not forget the state of a volume", "volume", o.v.ID, "error", err)
	}
}

// mount checks the filesystem and mounts it. On an error the mapping stays, so that
// a person can repair what is in it.
func (o *opening) mount(ctx context.Context) error {
	if o.v.Mount == "" {
		return nil
	}
	source := o.source()
	if place, err := mount.Find(o.v.Mount, false); err == nil {
		on, atErr := mount.At(place.Path)
		_ = place.Close()
		if atErr == nil && on != nil && on.Is(source.Device) {
			return o.mountedOn(place.Path)
		}
	}
	repaired := false
	err := o.step(ctx, "checked", func() (err error) {
		repaired, err = filesystem.Check(ctx, source.Path, o.v.Filesystem, o.mapping.ReadOnly)
		return err
	})
	if err != nil {
		return err
	}
	o.warn(o.e, "filesystem", "")
	if repaired {
		o.warn(o.e, "filesystem", "its own tool repaired the filesystem before it was mounted")
		o.Log.Warn("the filesystem was repaired before it was mounted", "volume", o.v.ID)
	}
	return o.step(ctx, "mounted", func() error {
		canonical, err := mount.Mount(source, o.v.Mount, o.v.Filesystem, mountOptions(o.v, o.mapping.ReadOnly))
		if err != nil {
			return filesystem.Damaged(source.Path, o.v.Filesystem, err)
		}
		if err := o.mountedOn(canonical); err != nil {
			return err
		}
		o.growCopy(ctx, canonical)
		return nil
	})
}

// mountedOn remembers where the volume is.
func (o *opening) mountedOn(canonical string) error {
	o.set(func() { o.e.known.Mount = canonical })
	return o.rememberKnown(o.e)
}

// mountOptions are a volume's own and what makes them safe.
func mountOptions(v node.Volume, readOnly bool) []string {
	options := filesystem.MountOptions(v.Filesystem, v.Options)
	if v.Source != "" && v.Filesystem == "xfs" {
		options = append(options, "nouuid") // its source has the same, and may be mounted beside it
	}
	if readOnly {
		options = append(options, "ro")
	}
	return options
}

func (o *opening) source() mount.Source { return sourceOf(o.mapping) }

func sourceOf(m luks.Mapping) mount.Source {
	return mount.Source{Path: m.Path, Device: unix.Mkdev(m.Device.Major, m.Device.Minor)}
}

func identity(k *keyclient.Key) luks.Identity {
	return luks.Identity{Volume: k.Volume, UUID: k.UUID, Generation: k.Generation}
}

func luksMACs(m keyclient.MACs) luks.MACs {
	return luks.MACs{Header: m.Header, Copies: [2]luks.MAC{m.Copies[0], m.Copies[1]}}
}

func keyMACs(m luks.MACs) keyclient.MACs {
	return keyclient.MACs{Header: m.Header, Copies: [2][32]byte{m.Copies[0], m.Copies[1]}}
}
