package agent

import (
	"context"
	"errors"
	"fmt"

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
	if key.State == keyclient.Pending {
		if err := o.writeHeader(ctx, key); err != nil {
			return err
		}
	}
	mark, err := luks.NewFilesystemMark(identity(key), [keyclient.AttemptSize]byte(key.Attempt), key.DEK)
	if err != nil {
		return err
	}
	if o.v.From != nil {
		// A copy takes long enough for a power cut, after which the attempt is another.
		if o.left, err = luks.MarkLeft(ctx, o.v.DevicePath(), identity(key), key.DEK); err != nil {
			return err
		}
	}
	if err := o.remember(o.state(key)); err != nil {
		return err
	}
	if err := o.step(ctx, "mapped", func() error { return o.activate(ctx, key) }); err != nil {
		return err
	}
	// The kernel has the volume key now; making the filesystem takes a while.
	if err := key.Close(); err != nil {
		return err
	}
	// From here on a lease that is lost, or ends, ends the writing too.
	o.set(func() { o.e.known = o.state(key) })
	o.hold(o.e, key.Lease)
	o.reserve(ctx, o.e)
	err = o.fill(ctx, mark)
	if err == nil {
		err = o.step(ctx, "confirmed", func() error { return o.Keys.Confirm(ctx, key) })
	}
	if err == nil {
		err = mark.Clear(ctx, o.v.DevicePath())
	}
	if err != nil {
		// A volume that is not active is not left open: nobody may use it yet.
		o.drop(ctx, o.e)
		o.set(func() { o.e.known = remembered{} })
		return errors.Join(err, luks.Close(context.WithoutCancel(ctx), o.closeRequest(o.mapping)))
	}
	key.State, o.created = keyclient.Active, true
	return nil
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
	h, err := luks.NewHeader(ctx, id, key.DEK)
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

// fill makes the filesystem of a volume that is not active yet, or copies the image that
// it begins with. What somebody wrote to it before is never overwritten, whatever the
// record says: a record that came back from a backup may call a volume new that is in
// use. Only what an attempt of this record left unfinished is made again, and the mark
// on the disk says so.
func (o *opening) fill(ctx context.Context, mark *luks.FilesystemMark) error {
	if o.v.Filesystem == "none" && o.v.From == nil {
		return nil
	}
	device := o.v.DevicePath()
	again, err := mark.Present(ctx, device)
	if err != nil {
		return err
	}
	if !again && !o.left {
		untouched, err := luks.DataUntouched(ctx, device)
		if err != nil {
			return err
		}
		if !untouched {
			return o.inUse(ctx)
		}
	}
	if !again {
		if err := mark.Set(ctx, device); err != nil {
			return err
		}
	}
	if o.v.From != nil {
		return o.copyImage(ctx)
	}
	return o.step(ctx, "filesystem", func() error {
		return filesystem.Make(ctx, o.mapping.Path, o.v.Filesystem, filesystem.Options{Label: o.v.Label, OneWriter: o.e.lease != nil && !o.v.NoMMP})
	})
}

// inUse says what is in a volume that should be new.
func (o *opening) inUse(ctx context.Context) error {
	found := "data"
	if all, err := luks.Signatures(ctx, o.mapping.Path); err == nil && len(all) > 0 {
		found = fmt.Sprint(all[0])
	}
	return failure.Newf(failure.Tampered, "the key service's storage may have been rolled back: keyagent volume accept-restore and the runbook say how to go on",
		"the key service says that the volume is new, but it holds %s", found)
}
