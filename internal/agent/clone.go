package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/luks"
)

// headerOfClone makes the header of a new volume whose disk is a clone of another one. Of
// the source it needs the key, for a moment, and no lease: who holds it goes on.
func (o *opening) headerOfClone(ctx context.Context, id luks.Identity, dek *luks.Key) (*luks.Header, error) {
	source, err := o.Keys.GetKey(ctx, keyclient.Request{Volume: o.v.Source, Clone: true})
	if err != nil {
		return nil, fmt.Errorf("source %q: %w", o.v.Source, err)
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
	o.cloned, o.tags = true, false // it has its tags, as all its data
	return h, nil
}

// goOnWithClone finds out whether a volume whose header stands was begun as a clone, whatever
// the configuration says by now: nothing may be made on its data.
func (o *opening) goOnWithClone(ctx context.Context) (err error) {
	if o.cloned, err = luks.SourceKept(ctx, o.v.DevicePath()); err != nil {
		return err
	}
	if o.v.Source != "" && !o.cloned {
		return failure.Newf(failure.State, "leave source out, and it is finished", "the volume was begun on a blank disk, and not as a clone of %q", o.v.Source)
	}
	return nil
}
