package luks

import (
	"context"
	"errors"
	"fmt"
)

// Sever takes a mapping out of use that another program made and that is not what it
// should be: whatever it is, nothing is read or written through it afterwards. It is
// removed, or, while something holds it open, cut off its disk as by [Cut]. It gives
// [ErrNotActive] if there is none.
//
// Unlike [Close] and [Cut] it asks for no UUID: the caller knows that there was no
// mapping of that name when it let the other program make one.
func Sever(ctx context.Context, name string) error {
	if err := sever(ctx, name); err != nil {
		return fmt.Errorf("sever mapping %.80q: %w", name, err)
	}
	return nil
}

func sever(ctx context.Context, name string) (err error) {
	if err := validateName(name); err != nil {
		return err
	}
	release, err := mappings.acquire(ctx, name)
	if err != nil {
		return err
	}
	defer release()
	live, err := inspect(name)
	if err != nil {
		return err
	}
	if uuid, ours := luksUUID(live.uuid, name); ours {
		defer func() {
			below := removeTags(ctx, name, uuid)
			if errors.Is(below, ErrDeviceBusy) {
				below = cutTags(ctx, name, uuid)
			}
			err = errors.Join(err, below)
		}()
	}
	err = kernelCall(ctx, "removing "+name, func() error { return remove(ctx, name, live.uuid) }, nil)
	if !errors.Is(err, ErrDeviceBusy) {
		if err == nil {
			dropNode(name, live.dev)
		}
		return err
	}
	var sectors int64
	for _, t := range live.table {
		sectors += int64(t.length)
	}
	return intoError(ctx, live, name, sectors)
}
