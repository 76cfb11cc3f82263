package luks

import (
	"cmp"
	"context"
	"errors"
	"fmt"
)

// CloseRequest names the mapping that is to be removed. It is removed only if it is
// the one.
type CloseRequest struct {
	Name string
	UUID string // of the LUKS2 header; empty for a throw-away mapping only
	// Device is the device below the mapping, as Mapping.DataDevice says. Zero is
	// any device: for a disk that is gone, whose number nobody knows any more.
	Device DevNum
	// Throwaway says that the mapping was made by OpenThrowaway.
	Throwaway bool
}

// Close removes a mapping. It gives [ErrNotActive] if there is none of that name,
// [ErrDeviceBusy] while it is mounted or open, and [ErrNameTaken] if it is not the
// mapping that was named: this package removes nothing that it would not have made.
func Close(ctx context.Context, req CloseRequest) error {
	if err := closeMapping(ctx, req); err != nil {
		return fmt.Errorf("close mapping %.80q: %w", req.Name, err)
	}
	return nil
}

func closeMapping(ctx context.Context, req CloseRequest) error {
	if err := validateName(req.Name); err != nil {
		return err
	}
	if req.Throwaway == (req.UUID != "") || !req.Throwaway && !uuidPattern.MatchString(req.UUID) {
		return fmt.Errorf("%w: UUID %.40q", ErrInvalid, req.UUID)
	}
	release, err := mappings.acquire(ctx, req.Name)
	if err != nil {
		return err
	}
	defer release()
	live, err := inspect(req.Name)
	if errors.Is(err, ErrNotActive) && !req.Throwaway {
		// Only the upper one of two was removed. As long as the lower one is there, it may
		// write, so this is no volume that is closed.
		return cmp.Or(removeTags(ctx, req.Name, req.UUID), err)
	}
	if err != nil {
		return err
	}
	want := throwawayUUID(req.Name)
	if !req.Throwaway {
		want = dmUUID(req.UUID, req.Name)
	}
	if live.uuid != want {
		return fmt.Errorf("%w: it has the UUID %.100q, expected is %q", ErrNameTaken, live.uuid, want)
	}
	if !live.empty {
		m, err := describe(live, req.Name)
		if err != nil {
			return err
		}
		if req.Device != (DevNum{}) && m.DataDevice != req.Device && !m.Cut {
			return fmt.Errorf("%w: it lies on device %v, not on %v", ErrNameTaken, m.DataDevice, req.Device)
		}
	}
	if live.open > 0 {
		return fmt.Errorf("%w: it is held open %d times", ErrDeviceBusy, live.open)
	}
	err = kernelCall(ctx, "removing "+req.Name, func() error { return remove(ctx, req.Name, live.uuid) }, nil)
	if err == nil {
		dropNode(req.Name, live.dev)
	}
	if err == nil && !req.Throwaway {
		err = removeTags(ctx, req.Name, req.UUID)
	}
	return err
}

// Status describes the mapping name from the kernel's live table. It gives
// [ErrNotActive] if there is none, [ErrNameTaken] if it is something else's and
// [ErrTableMismatch] if the table is not one that this package makes. It reads no
// device. Whose key a mapping has, [Prove] says.
func Status(ctx context.Context, name string) (Mapping, error) {
	m, err := status(ctx, name)
	if err != nil {
		return Mapping{}, fmt.Errorf("status of mapping %.80q: %w", name, err)
	}
	return m, nil
}

func status(ctx context.Context, name string) (Mapping, error) {
	if err := validateName(name); err != nil {
		return Mapping{}, err
	}
	if err := ctx.Err(); err != nil {
		return Mapping{}, err
	}
	live, err := inspect(name)
	if err != nil {
		return Mapping{}, err
	}
	return describe(live, name)
}

// Mappings describes every mapping that looks like one of this package's.
func Mappings(ctx context.Context) ([]Mapping, error) {
	names, err := dmNames()
	if err != nil {
		return nil, err
	}
	var all []Mapping
	for _, name := range names {
		m, err := status(ctx, name)
		switch {
		case err == nil:
			all = append(all, m)
		case errors.Is(err, ErrNotActive), errors.Is(err, ErrNameTaken), errors.Is(err, ErrTableMismatch), errors.Is(err, ErrInvalid):
			// Somebody else's.
		default:
			return nil, fmt.Errorf("list mappings: %w", err)
		}
	}
	return all, nil
}

// describe reads a mapping by what its UUID says that it is.
func describe(live liveMapping, name string) (Mapping, error) {
	uuid, ours := luksUUID(live.uuid, name)
	throwaway := live.uuid == throwawayUUID(name)
	if !ours && !throwaway {
		return Mapping{}, fmt.Errorf("%w: it has the UUID %.100q", ErrNameTaken, live.uuid)
	}
	if live.empty {
		return Mapping{}, fmt.Errorf("%w: %s was never finished", ErrNotActive, name)
	}
	if throwaway {
		return checkThrowaway(live, name)
	}
	if m, yes := cutMapping(live, name, uuid); yes {
		return m, nil
	}
	return checkTable(live, name, uuid)
}
