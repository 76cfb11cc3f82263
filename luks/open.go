package luks

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Mapping is an active volume, as the kernel describes it.
type Mapping struct {
	Name       string
	Path       string // /dev/mapper/<Name>
	UUID       string // of the LUKS2 header; empty for a throw-away mapping
	Device     DevNum // of the mapping
	DataDevice DevNum // of the device below it
	Bytes      int64  // length of the plaintext
	ReadOnly   bool
	Discards   bool // TRIM passes through to the device
	Workqueues bool // dm-crypt hands requests to its workqueues
	InUse      bool // something holds the mapping open
	Suspended  bool // reads and writes wait for Resume
	Throwaway  bool // made by OpenThrowaway
	Cut        bool // taken off its disk by Cut: it only gives errors, and has no DataDevice
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

// OpenRequest names a volume, its device and the mapping that it is to have.
type OpenRequest struct {
	Device   string
	Name     string
	Identity Identity
	MACs     MACs
	Options  OpenOptions
}

// Existing names a volume that is mapped. Its key is proved before anything is done.
type Existing struct {
	Device   string
	Name     string
	Identity Identity
	MACs     MACs
	// Header is what Open returned. If it is nil, the header is read from the device.
	Header *Header
}

// Open maps the volume on device as /dev/mapper/<name>, and returns its header.
//
// The header is read once, as by [ReadHeader]. Only then is its keyslot opened, in a
// copy of the header in memory, the mapping made, and the kernel's live table compared
// with what the header stands for. On any error there is no mapping, and nothing on
// the device has changed.
//
// A device whose size is no multiple of 4096 bytes is used rounded down. One that is
// read-only gives [ErrReadOnlyDevice] unless the options say read-only, too.
//
// Open is idempotent: if name is already mapped, it succeeds if the mapping has
// the UUID of id, lies on this device and decrypts with this volume's key. It gives
// [ErrNameTaken] for another UUID or device, [ErrTableMismatch] if its table is not
// valid, [ErrNotOurs] if its key is another, and [ErrSuspended]. The Mapping then
// says which options are in force; they are those of the first Open.
func Open(ctx context.Context, req OpenRequest, dek *Key) (Mapping, *Header, error) {
	m, h, err := open(ctx, req, dek)
	if err != nil {
		return Mapping{}, nil, fmt.Errorf("open volume %q: %w", req.Identity.Volume, err)
	}
	return m, h, nil
}

func open(ctx context.Context, req OpenRequest, dek *Key) (m Mapping, h *Header, err error) {
	if err := cmp.Or(req.Identity.validate(), validateName(req.Name), validateKey(dek), req.MACs.validate()); err != nil {
		return m, nil, err
	}
	release, err := acquireBoth(ctx, req.Identity.Volume, req.Name)
	if err != nil {
		return m, nil, err
	}
	defer release()
	d, err := openShared(ctx, req.Device)
	if err != nil {
		return m, nil, err
	}
	defer d.Close()
	if err := d.mustBeBlock(); err != nil {
		return m, nil, err
	}
	live, err := inspect(req.Name)
	mapped := err == nil
	switch {
	case mapped && live.unborn(req.Identity.UUID, req.Name):
		if err := remove(ctx, req.Name, live.uuid); err != nil {
			return m, nil, err
		}
		mapped = false
	case mapped:
		if m, err = sameVolume(live, req.Name, req.Identity, d); err != nil {
			return m, nil, err
		}
	case !errors.Is(err, ErrNotActive):
		return m, nil, err
	}
	if h, err = d.examine(req.Identity, req.MACs, dek); err != nil {
		return m, nil, err
	}
	if mapped {
		return m, h, d.prove(m, h, dek)
	}
	if err := d.checkSize(); err != nil {
		return m, nil, err
	}
	m, err = d.activate(ctx, req.Name, h, dek, req.Options)
	return m, h, err
}

// acquireBoth takes the locks of a volume and a mapping, always in this order.
func acquireBoth(ctx context.Context, volume, name string) (release func(), err error) {
	releaseVolume, err := volumes.acquire(ctx, volume)
	if err != nil {
		return nil, err
	}
	releaseMapping, err := mappings.acquire(ctx, name)
	if err != nil {
		releaseVolume()
		return nil, err
	}
	return func() { releaseMapping(); releaseVolume() }, nil
}

// sameVolume decides whether a mapping that exists says that it is the one that was
// asked for. Whether it is, its key has to prove.
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

// activate maps a device by an authentic header, which need not be what stands
// on the device by now.
func (d *disk) activate(ctx context.Context, name string, h *Header, dek *Key, opts OpenOptions) (m Mapping, err error) {
	if err := ctx.Err(); err != nil {
		return m, err
	}
	if d.readOnly && !opts.ReadOnly {
		return m, fmt.Errorf("%w: %s can be opened read-only", ErrReadOnlyDevice, d.path)
	}
	if err := d.unclaimed(ctx); err != nil {
		return m, err
	}
	vk, err := h.volumeKey(dek)
	if err != nil {
		return m, err
	}
	defer vk.Close()
	// The device goes by its number: it is the one that the header was read from,
	// whatever its path leads to now, and its number is taken while it is open.
	c := creation{
		name: name, uuid: dmUUID(h.uuid, name), readOnly: opts.ReadOnly, bytes: d.plainBytes(),
		params: cryptParams(volumeKeyRef(h.uuid), d.rdev, dataOffset, opts),
	}
	undo := func() { _ = remove(context.WithoutCancel(ctx), c.name, c.uuid) }
	err = kernelCall(ctx, "mapping "+name, func() error {
		return withVolumeKey(h.uuid, vk, func() error { return c.create(ctx) })
	}, undo)
	if err != nil {
		return m, err
	}
	if m, err = d.confirm(name, h.uuid, opts); err == nil {
		err = cmp.Or(d.soleHolder(), ensureNode(m))
	}
	if err != nil {
		undo()
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
	switch {
	case m.Suspended:
		return Mapping{}, fmt.Errorf("%w: %s is suspended", ErrTableMismatch, name)
	case m.DataDevice != d.rdev:
		return Mapping{}, fmt.Errorf("%w: %s lies on device %v, not on %v", ErrTableMismatch, name, m.DataDevice, d.rdev)
	case m.Bytes != d.plainBytes():
		return Mapping{}, fmt.Errorf("%w: %s has %d bytes, expected are %d", ErrTableMismatch, name, m.Bytes, d.plainBytes())
	case m.options() != opts:
		return Mapping{}, fmt.Errorf("%w: %s is not mapped as asked for", ErrTableMismatch, name)
	}
	return m, nil
}

// unclaimed refuses a device that is mounted or mapped. dm-crypt alone does not: for
// the kernel, all mappings are one claimant.
func (d *disk) unclaimed(ctx context.Context) error {
	claim, err := openDisk(ctx, d.path, unix.O_RDONLY|unix.O_EXCL)
	if err != nil {
		return err
	}
	defer claim.Close()
	if claim.rdev != d.rdev {
		return fmt.Errorf("%w: %s is another device now", ErrVolumeMismatch, d.path)
	}
	return nil
}

// soleHolder refuses a device that another process has mapped since it was unclaimed.
func (d *disk) soleHolder() error {
	holders, err := os.ReadDir(fmt.Sprintf("/sys/dev/block/%v/holders", d.rdev))
	if err == nil && len(holders) > 1 {
		return fmt.Errorf("%w: %s has been mapped by somebody else as well", ErrDeviceBusy, d.path)
	}
	return nil
}
