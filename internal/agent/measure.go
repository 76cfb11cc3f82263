package agent

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/keyagent/keyagent/internal/measured"
	"github.com/keyagent/keyagent/luks"
)

// measuring is what one opening knows of the measurement of its volume.
type measuring struct {
	event measured.Event
	done  uint64 // the Sequence of the mapping that was measured, see remembered
}

// measurable refuses, before anything else is done, to open a volume that would have to
// be measured where nothing can be. A TPM is waited for as disks are: its driver may be
// late.
func (o *opening) measurable(ctx context.Context) error {
	if !o.v.Measure {
		return nil
	}
	_, never := o.Register.(measured.None)
	deadline := time.Now().Add(o.AppearWait)
	for first := true; ; first = false {
		err := o.Register.Ready(ctx)
		if !errors.Is(err, measured.ErrNoRegister) || never || o.intent.NoWait || !time.Now().Before(deadline) {
			return err
		}
		if first {
			o.Log.Info("waiting for a register to measure the volume", "volume", o.v.ID, "error", err, "at_most", o.AppearWait)
			o.Progress("waiting for a register to measure the volume "+o.v.ID, o.AppearWait)
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

// isMeasured reports whether a mapping of ours, which was remembered, needs no
// measurement. An agent that ended between the mapping and its measurement left one that
// does.
func (o *opening) isMeasured(r remembered) bool {
	return !o.v.Measure || r.Measured == r.Sequence
}

// measureOnce measures a mapping, unless that was done before. A mapping that is made
// anew is another one, also of the same volume.
func (o *opening) measureOnce(ctx context.Context) error {
	number := sequence(o.mapping.Device)
	if !o.v.Measure || number != 0 && o.measure.done == number {
		return nil
	}
	return o.step(ctx, "measured", func() error {
		r, err := o.Register.Extend(ctx, o.measure.event)
		if err != nil {
			return fmt.Errorf("measure the volume: %w", err)
		}
		o.Log.Info("volume is measured", "volume", o.v.ID, "register", r.Register, "digest", hex.EncodeToString(r.Digest), "text", o.measure.event.Text)
		o.set(func() { o.e.known.Measured = number })
		if err := o.rememberKnown(o.e); err != nil {
			o.Log.Warn("could not keep the state of a volume: the next agent measures it again", "volume", o.v.ID, "error", err)
		}
		return nil
	})
}

// measureOrClose measures a mapping that this opening made, and leaves none that could
// not be measured.
func (o *opening) measureOrClose(ctx context.Context) error {
	err := o.measureOnce(ctx)
	if err == nil {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	if closeErr := luks.Close(ctx, o.closeRequest(o.mapping)); closeErr != nil {
		return errors.Join(err, closeErr)
	}
	lease := o.e.known.LeaseID
	o.drop(ctx, o.e)
	o.set(func() { o.e.known, o.e.header = remembered{}, nil })
	o.release(ctx, o.v.ID, lease)
	return errors.Join(err, o.forget(o.v.ID))
}
