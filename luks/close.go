package luks

import (
	"context"
	"fmt"
)

// Close removes the mapping name. It gives [ErrNotActive] if there is none,
// [ErrDeviceBusy] while it is mounted or open, and [ErrNameTaken] if it is not
// the mapping of a LUKS2 volume: this package removes nothing that it would not
// have made.
func Close(ctx context.Context, name string) error {
	if err := closeMapping(ctx, name); err != nil {
		return fmt.Errorf("close mapping %.80q: %w", name, err)
	}
	return nil
}

func closeMapping(ctx context.Context, name string) error {
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
	if _, ours := luksUUID(live.uuid, name); !ours {
		return fmt.Errorf("%w: it has the UUID %.100q", ErrNameTaken, live.uuid)
	}
	if uuid, _ := luksUUID(live.uuid, name); live.unborn(uuid, name) {
		return removeUnborn(live, name)
	}
	// libcryptsetup would try again for a second before it says so.
	if live.open > 0 {
		return fmt.Errorf("%w: it is held open %d times", ErrDeviceBusy, live.open)
	}
	// A context without a device: libcryptsetup must not go and read the header
	// that the host keeps below the mapping.
	return withSession("", "", func(s *session) error { return s.deactivate(name) })
}

// Status describes the mapping name from the kernel's live table. It gives
// [ErrNotActive] if there is none, [ErrNameTaken] if it is something else's and
// [ErrTableMismatch] if the table is not one that Open makes.
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
	uuid, ours := luksUUID(live.uuid, name)
	if !ours {
		return Mapping{}, fmt.Errorf("%w: it has the UUID %.100q", ErrNameTaken, live.uuid)
	}
	if live.unborn(uuid, name) {
		return Mapping{}, fmt.Errorf("%w: %s was never finished", ErrNotActive, name)
	}
	return checkTable(live, name, uuid)
}
