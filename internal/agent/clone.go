package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/luks"
)

// headerOfClone makes the header of a new volume whose disk is a clone of another one. Of
// the source it needs the key, for a moment, and no lease: who holds it goes on.
func (o *opening) headerOfClone(ctx context.Context, id luks.Identity, dek *luks.Key) (*luks.Header, error) {
	if err := o.notTheSourcesDisk(); err != nil {
		return nil, err
	}
	source, err := o.Keys.GetKey(ctx, keyclient.Request{Volume: o.v.Source, Clone: true})
	if err != nil {
		err = fmt.Errorf("source %q: %w", o.v.Source, err)
		switch f := failure.Of(err); f.Class {
		case failure.NotFound, failure.State:
			err = failure.WithID(failure.New(f.Class, err, "the source has to be a volume that was opened once, and is not retired"), f.CorrelationID)
		case failure.Usage: // it does not know what is asked for
			err = failure.WithID(failure.New(f.Class, err, "upgrade the key service: one of before makes no clones"), f.CorrelationID)
		}
		return nil, err
	}
	defer source.Close()
	h, err := luks.NewCloneHeader(ctx, o.v.DevicePath(), luks.Source{Identity: identity(source), MACs: luksMACs(source.MACs)}, source.DEK, id, dek)
	alien := []error{luks.ErrHeaderRefused, luks.ErrHeaderMAC, luks.ErrVolumeMismatch, luks.ErrWrongKey}
	switch {
	case slices.ContainsFunc(alien, func(is error) bool { return errors.Is(err, is) }):
		return nil, failure.New(failure.Of(classify(err)).Class, err, fmt.Sprintf("is the disk a clone of volume %s, or of a snapshot that is no older than its header?", o.v.Source))
	case err != nil:
		return nil, err
	case o.v.Integrity != "" && h.Integrity() == "":
		return nil, luks.ErrNoIntegrity
	}
	// Before it is written: what the source is, the clone is.
	as := o.v
	as.Integrity = string(h.Integrity())
	if err := as.Validate(); err != nil {
		return nil, failure.New(failure.Usage, fmt.Errorf("the source has integrity: %w", err), "")
	}
	if size, err := luks.DeviceBytes(ctx, o.v.DevicePath()); err == nil && h.Integrity() != "" && luks.Room(size, h.Integrity()) > h.Length() {
		o.Log.Warn("the disk is larger than its source, and a volume with integrity stays as large as that", "volume", o.v.ID)
	}
	o.cloned, o.tags = true, false // it has its tags, as all its data
	return h, nil
}

// notTheSourcesDisk refuses the disk of the source itself, as far as this node knows which
// that is: its header looks the same.
func (o *opening) notTheSourcesDisk() error {
	e := o.find(o.v.Source)
	if e == nil {
		return nil
	}
	var device string
	o.set(func() { device = e.spec.DevicePath() })
	var disk, source unix.Stat_t
	if unix.Stat(o.v.DevicePath(), &disk) == nil && unix.Stat(device, &source) == nil && disk.Rdev == source.Rdev {
		return failure.Newf(failure.Configuration, "device names the copy", "%s is the disk of %q itself, and no clone of it", o.v.DevicePath(), o.v.Source)
	}
	return nil
}

// goOnWithClone finds out whether a volume whose header stands was begun as a clone: then
// nothing may be made on its data. What was begun in another way is not taken for one, since
// nothing would be made on it, or copied to it, and it would be used as it is.
func (o *opening) goOnWithClone(ctx context.Context, key *keyclient.Key) (err error) {
	if o.cloned, err = luks.SourceKept(ctx, o.v.DevicePath(), identity(key), key.DEK); err != nil {
		return err
	}
	switch {
	case o.cloned && o.v.Source == "":
		return failure.Newf(failure.State, "say source again, and it is finished", "the volume was begun as a clone, of which source says nothing now")
	case o.v.Source != "" && !o.cloned:
		return failure.Newf(failure.State, "leave source out, and it is finished", "the volume was not begun as a clone of %q, or its disk has no word of that any more", o.v.Source)
	}
	return nil
}
