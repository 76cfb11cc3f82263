package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/filesystem"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/luks"
)

// provision creates a volume, in the order that docs/spec/volume-record.md gives:
// the header is made in memory; the record names this attempt; the header is
// written; the record says that it stands; the volume is mapped and its filesystem
// made; the record says active. A crash at any point leaves a record from which the
// next run goes on, and another node that is in the middle of it writes nothing.
func (o *opening) provision(ctx context.Context, key *keyclient.Key) error {
	o.on(o.e, EventCreate, nil)
	o.tags = o.v.Integrity != ""
	if key.State == keyclient.Pending {
		if err := o.writeHeader(ctx, key); err != nil {
			return err
		}
	} else {
		// The header that stands decides, whatever the configuration says by now.
		h, err := luks.ReadHeader(ctx, luks.HeaderRequest{Device: o.v.DevicePath(), Identity: identity(key), MACs: luksMACs(key.MACs)}, key.DEK)
		if err != nil {
			return err
		}
		if o.tags && h.Integrity() == "" {
			return luks.ErrNoIntegrity
		}
		if err := o.goOnWithClone(ctx, key); err != nil {
			return err
		}
		o.tags = h.Integrity() != "" && !o.cloned
	}
	mark, err := luks.NewFilesystemMark(identity(key), [keyclient.AttemptSize]byte(key.Attempt), key.DEK)
	if err != nil {
		return err
	}
	// Of any attempt: after a power cut it is another one.
	if o.left, err = luks.MarkLeft(ctx, o.v.DevicePath(), identity(key), key.DEK); err != nil {
		return err
	}
	if err := o.remember(o.state(key)); err != nil {
		return err
	}
	if o.tags {
		// Mapping it writes tags.
		if err := o.claimData(ctx, mark); err != nil {
			return err
		}
		o.fresh = true
	}
	if err := o.step(ctx, "mapped", func() error { return o.activate(ctx, key) }); err != nil {
		return err
	}
	// The kernel has the volume key now; making the filesystem takes a while.
	if err := key.Close(); err != nil {
		return err
	}
	// From here on a lease that is lost, or ends, ends the writing too.
	unfinished := o.state(key)
	unfinished.Sequence = 0 // another agent must not take the mapping for a volume that is open
	o.set(func() { o.e.known = unfinished })
	o.hold(o.e, key.Lease)
	o.reserve(ctx, o.e)
	err = o.fill(ctx, mark)
	if err == nil {
		err = o.step(ctx, "confirmed", func() error { return o.Keys.Confirm(ctx, key) })
	}
	if err == nil {
		err = mark.Clear(ctx, o.v.DevicePath())
	}
	if err == nil && o.cloned {
		err = luks.ForgetSource(ctx, o.v.DevicePath())
	}
	if err != nil {
		// A volume that is not active is not left open: nobody may use it yet.
		o.drop(ctx, o.e)
		o.set(func() { o.e.known = remembered{} })
		if o.tags {
			// It may be suspended, with a write that waits. Nothing on it is worth keeping.
			err = errors.Join(err, luks.Cut(context.WithoutCancel(ctx), o.v.Name, key.UUID))
		}
		return errors.Join(err, o.discard(context.WithoutCancel(ctx)))
	}
	key.State, o.created = keyclient.Active, true
	return nil
}

// discard closes what is not finished. A tool whose write was cut off may hold it open for
// a moment longer.
func (o *opening) discard(ctx context.Context) (err error) {
	for range 40 {
		if err = luks.Close(ctx, o.closeRequest(o.mapping)); !errors.Is(err, luks.ErrDeviceBusy) || !o.tags {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

// writeHeader puts a header on a blank disk, between the record's two words.
func (o *opening) writeHeader(ctx context.Context, key *keyclient.Key) error {
	// Before the key service limits the time in which the header has to be written.
	release, err := o.formatTurn(ctx)
	if err != nil {
		return err
	}
	defer release()
	id := identity(key)
	h, err := o.newHeader(ctx, id, key.DEK)
	if err != nil {
		return err
	}
	until, err := o.Keys.BeginFormat(ctx, key, keyMACs(h.MACs()))
	if err != nil {
		return err
	}
	// Write refuses what is neither blank nor an earlier attempt of this volume.
	if err := o.step(ctx, "formatted", func() error {
		return luks.Write(ctx, luks.WriteRequest{
			Device: o.v.DevicePath(), Identity: id, Header: h, Until: luks.DeadlineIn(until - keyclient.Boottime()),
		}, key.DEK)
	}); err != nil {
		return err
	}
	return o.Keys.HeaderStands(ctx, key)
}

func (o *opening) newHeader(ctx context.Context, id luks.Identity, dek *luks.Key) (*luks.Header, error) {
	if o.v.Source != "" {
		return o.headerOfClone(ctx, id, dek)
	}
	size, err := luks.DeviceBytes(ctx, o.v.DevicePath())
	if err != nil {
		return nil, err
	}
	return luks.NewHeader(ctx, id, luks.Layout{Integrity: luks.Integrity(o.v.Integrity), DeviceBytes: size}, dek)
}

// fill makes the filesystem of a volume that is not active yet, or copies the image that
// it begins with. What somebody wrote to it before is never overwritten, whatever the
// record says: a record that came back from a backup may call a volume new that is in
// use. Only what an attempt of this record left unfinished is made again, and the mark
// on the disk says so.
func (o *opening) fill(ctx context.Context, mark *luks.FilesystemMark) error {
	if o.cloned {
		return o.holdsFilesystem(ctx)
	}
	if o.tags {
		if err := o.wipe(ctx); err != nil {
			return err
		}
	}
	if o.v.Filesystem == "none" && o.v.From == nil {
		return nil
	}
	if !o.tags {
		if err := o.claimData(ctx, mark); err != nil {
			return err
		}
	}
	defer o.announce()
	if o.v.From != nil {
		return o.copyImage(ctx)
	}
	return o.step(ctx, "filesystem", func() error {
		return filesystem.Make(ctx, o.mapping.Path, o.v.Filesystem, filesystem.Options{Label: o.v.Label, OneWriter: o.e.lease != nil && !o.v.NoMMP})
	})
}

// announce tells udev of what was made: units of systemd wait for its word.
func (o *opening) announce() {
	if err := luks.Announce(o.mapping); err != nil {
		o.Log.Warn("udev does not look at a volume again", "volume", o.v.ID, "error", err)
	}
}

// claimData sets the mark of this attempt on a disk on which nobody has written data.
func (o *opening) claimData(ctx context.Context, mark *luks.FilesystemMark) error {
	err := mark.Claim(ctx, o.v.DevicePath(), o.left)
	if errors.Is(err, luks.ErrNotBlank) {
		return o.inUse(ctx)
	}
	return err
}

// wipe gives each sector of a new volume with integrity a tag. XFS reads nothing that it
// has not written, so that the ends are enough for it.
func (o *opening) wipe(ctx context.Context) error {
	all := o.v.Filesystem != "xfs" || o.v.From != nil
	defer func() { o.set(func() { o.e.progress = "" }) }()
	return o.step(ctx, "wiped", func() error { return luks.Wipe(ctx, o.mapping, all, o.wiping(ctx, o.e)) })
}

// wiping tells of a wipe at each full percent.
func (c *Volumes) wiping(ctx context.Context, e *entry) func(done, total int64) {
	last := int64(-1)
	return func(done, total int64) {
		percent := done * 100 / max(total, 1)
		if percent == last {
			return
		}
		last = percent
		text := fmt.Sprintf("wiping, %d %% of %d MiB", percent, total>>20)
		c.set(func() { e.progress = text })
		if tell, ok := ctx.Value(progressKey{}).(func(string, time.Duration)); ok {
			tell(text, 0)
		}
	}
}

// inUse says what is in a volume that should be new.
func (o *opening) inUse(ctx context.Context) error {
	found := "data"
	if o.mapping.Path != "" {
		if all, err := luks.Signatures(ctx, o.mapping.Path); err == nil && len(all) > 0 {
			found = fmt.Sprint(all[0])
		}
	}
	return failure.Newf(failure.Tampered, "the key service's storage may have been rolled back: keyagent volume accept-restore and the runbook say how to go on",
		"the key service says that the volume is new, but it holds %s", found)
}
