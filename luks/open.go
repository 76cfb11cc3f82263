package luks

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/internal/secret"
)

// Mapping is an active volume, as the kernel describes it.
type Mapping struct {
	Name       string
	Path       string // /dev/mapper/<Name>
	UUID       string // of the LUKS2 header
	Device     DevNum // of the mapping
	DataDevice DevNum // of the device below it
	Bytes      int64  // length of the plaintext
	ReadOnly   bool
	Discards   bool // TRIM passes through to the device
	Workqueues bool // dm-crypt hands requests to its workqueues
	InUse      bool // something holds the mapping open
}

// OpenOptions is how a volume is mapped. The zero value is the default: writable,
// no TRIM, no workqueues.
type OpenOptions struct {
	ReadOnly bool
	// AllowDiscards passes TRIM through, which tells the host what is unused.
	AllowDiscards bool
	// Workqueues keeps dm-crypt's read and write workqueues. They are off unless
	// asked for: on the disks of virtual machines they add latency and no
	// throughput.
	Workqueues bool
}

// Open maps the volume on device as /dev/mapper/<name>.
//
// The header is read once. It must satisfy the guard, carry the UUID of id and
// match want under dek; only then is the copy that was read handed to
// libcryptsetup, and the kernel's live table compared with what it stands for.
// On any error there is no mapping, and nothing on the device has changed.
//
// Open is idempotent: if name is already mapped, it succeeds if the mapping has
// the UUID of id and lies on this device, and gives [ErrNameTaken] otherwise or
// [ErrTableMismatch] if its table is not valid. The Mapping then says which
// options are in force; they are those of the first Open.
func Open(ctx context.Context, device, name string, id Identity, want MAC, dek *secret.Bytes, opts OpenOptions) (Mapping, error) {
	m, err := open(ctx, device, name, id, want, dek, opts)
	if err != nil {
		return Mapping{}, fmt.Errorf("open volume %q: %w", id.Volume, err)
	}
	return m, nil
}

func open(ctx context.Context, device, name string, id Identity, want MAC, dek *secret.Bytes, opts OpenOptions) (Mapping, error) {
	if err := cmp.Or(id.validate(), validateName(name), validateKey(dek)); err != nil {
		return Mapping{}, err
	}
	if want == (MAC{}) {
		return Mapping{}, fmt.Errorf("%w: no MAC was given", ErrHeaderMAC)
	}
	releaseVolume, err := volumes.acquire(ctx, id.Volume)
	if err != nil {
		return Mapping{}, err
	}
	defer releaseVolume()
	releaseMapping, err := mappings.acquire(ctx, name)
	if err != nil {
		return Mapping{}, err
	}
	defer releaseMapping()

	d, err := openShared(device)
	if err != nil {
		return Mapping{}, err
	}
	defer d.Close()
	if !d.block {
		return Mapping{}, fmt.Errorf("%w: %s", ErrNotBlockDevice, device)
	}
	switch live, err := inspect(name); {
	case err == nil && live.unborn(id.UUID, name):
		if err := removeUnborn(live, name); err != nil {
			return Mapping{}, err
		}
	case err == nil:
		return sameVolume(live, name, id, d)
	case !errors.Is(err, ErrNotActive):
		return Mapping{}, err
	}
	header, err := d.examine(ctx, id, want, dek)
	if err != nil {
		return Mapping{}, err
	}
	if err := d.checkSize(); err != nil {
		return Mapping{}, err
	}
	return d.activate(ctx, name, header, dek, opts)
}

// sameVolume decides whether a mapping that exists is the one that was asked for.
func sameVolume(live liveMapping, name string, id Identity, d *disk) (Mapping, error) {
	if live.uuid != dmUUID(id.UUID, name) {
		return Mapping{}, fmt.Errorf("%w: %s has the UUID %.100q", ErrNameTaken, name, live.uuid)
	}
	m, err := checkTable(live, name, id.UUID)
	if err != nil {
		return Mapping{}, err
	}
	if m.DataDevice != d.rdev {
		return Mapping{}, fmt.Errorf("%w: %s lies on device %v, not on %s (%v)", ErrNameTaken, name, m.DataDevice, d.path, d.rdev)
	}
	return m, ensureNode(m)
}

// examine reads the header and accepts it or says why not.
func (d *disk) examine(ctx context.Context, id Identity, want MAC, dek *secret.Bytes) (authentic, error) {
	raw, err := d.readGuarded(ctx)
	if err != nil {
		return authentic{}, err
	}
	g, err := guard(raw)
	if err != nil {
		return authentic{}, err
	}
	return authenticate(g, id, want, dek)
}

// activate maps a device by an authentic header, which need not be what stands
// on the device by now.
func (d *disk) activate(ctx context.Context, name string, header authentic, dek *secret.Bytes, opts OpenOptions) (Mapping, error) {
	if err := ctx.Err(); err != nil {
		return Mapping{}, err
	}
	held, err := copyOf(header)
	if err != nil {
		return Mapping{}, err
	}
	defer held.Close()
	flags := activation{readOnly: opts.ReadOnly, discards: opts.AllowDiscards, workqueues: opts.Workqueues}
	var m Mapping
	// The device goes by its descriptor: it is the one that the header was read
	// from, whatever its path leads to now.
	err = withSession(held.path(), descriptorPath(d.file), func(s *session) error {
		if err := s.load(header.uuid); err != nil {
			return err
		}
		if err := s.unlock(name, dek, flags); err != nil {
			return err
		}
		if m, err = d.confirm(name, header.uuid, opts); err != nil {
			return errors.Join(err, s.deactivate(name))
		}
		return nil
	})
	if err != nil {
		return Mapping{}, err
	}
	return m, nil
}

// confirm compares the mapping that was just made with what was asked for.
func (d *disk) confirm(name, uuid string, opts OpenOptions) (Mapping, error) {
	live, err := inspect(name)
	if err != nil {
		return Mapping{}, err
	}
	if live.uuid != dmUUID(uuid, name) {
		return Mapping{}, fmt.Errorf("%w: %s has the UUID %.100q", ErrTableMismatch, name, live.uuid)
	}
	m, err := checkTable(live, name, uuid)
	if err != nil {
		return Mapping{}, err
	}
	wantBytes := d.size - dataOffset
	switch {
	case m.DataDevice != d.rdev:
		return Mapping{}, fmt.Errorf("%w: %s lies on device %v, not on %v", ErrTableMismatch, name, m.DataDevice, d.rdev)
	case m.Bytes != wantBytes:
		return Mapping{}, fmt.Errorf("%w: %s has %d bytes, expected are %d", ErrTableMismatch, name, m.Bytes, wantBytes)
	case m.ReadOnly != opts.ReadOnly, m.Discards != opts.AllowDiscards, m.Workqueues != opts.Workqueues:
		return Mapping{}, fmt.Errorf("%w: %s is not mapped as asked for", ErrTableMismatch, name)
	}
	return m, nil
}

// Adopt returns the MAC of a complete header for a record that does not have one
// yet: a format was completed, and the word of it was lost. The header must
// satisfy the guard, carry the UUID of id, and its keyslot must open with dek,
// which only somebody who knows dek can have arranged. Adopt writes nothing of
// its own; it flushes the device, so that the header it vouches for stays.
//
// A record that has a MAC is never adopted for: that would accept any older
// header of the same volume.
func Adopt(ctx context.Context, device string, id Identity, dek *secret.Bytes) (MAC, error) {
	mac, err := adopt(ctx, device, id, dek)
	if err != nil {
		return MAC{}, fmt.Errorf("adopt header of volume %q: %w", id.Volume, err)
	}
	return mac, nil
}

func adopt(ctx context.Context, device string, id Identity, dek *secret.Bytes) (MAC, error) {
	if err := cmp.Or(id.validate(), validateKey(dek)); err != nil {
		return MAC{}, err
	}
	release, err := volumes.acquire(ctx, id.Volume)
	if err != nil {
		return MAC{}, err
	}
	defer release()
	d, err := openShared(device)
	if err != nil {
		return MAC{}, err
	}
	defer d.Close()
	return d.adopt(ctx, id, dek)
}

func (d *disk) adopt(ctx context.Context, id Identity, dek *secret.Bytes) (MAC, error) {
	if err := d.checkSize(); err != nil {
		return MAC{}, err
	}
	// The format may have been killed before its last flush. What is adopted
	// must not be lost with the power afterwards.
	if err := d.settle(); err != nil {
		return MAC{}, err
	}
	raw, err := d.readGuarded(ctx)
	if err != nil {
		return MAC{}, err
	}
	g, err := guard(raw)
	if err != nil {
		return MAC{}, err
	}
	if g.uuid != id.UUID {
		return MAC{}, mismatch(g, id)
	}
	if err := prove(g, dek); err != nil {
		return MAC{}, err
	}
	return headerMAC(g, id, dek)
}

// prove opens the keyslot of a guarded header, which also verifies its digest,
// and maps nothing.
func prove(g guarded, dek *secret.Bytes) error {
	held, err := copyOf(authentic(g))
	if err != nil {
		return err
	}
	defer held.Close()
	return withSession(held.path(), "", func(s *session) error {
		if err := s.load(g.uuid); err != nil {
			return err
		}
		return s.unlock("", dek, activation{})
	})
}
