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
	Integrity  Integrity
	NoJournal  bool // of the tags
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
	// NoJournal has an authenticated volume write sectors and tags in place. It is
	// faster, and a sector that was being written when the power failed gives an error
	// until it is written again. It says nothing to other volumes.
	NoJournal bool
}

// OpenRequest names a volume, its device and the mapping that it is to have.
type OpenRequest struct {
	Device   string
	Name     string
	Identity Identity
	MACs     MACs
	// Header is one that was read already, which is used in place of the one in front. Nil:
	// that is read.
	Header  *Header
	Options OpenOptions
	// Integrity is what the volume must have at least: a header that says less is
	// refused. Zero: whatever the header says.
	Integrity Integrity
	// FreshTags lays out the tags of an authenticated volume anew. All that was in it
	// is lost: it is for a first format, and the caller has made sure that nothing is
	// there.
	FreshTags bool
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
	if h, err = d.headerFor(req.Header, req.Identity, req.MACs, dek); err != nil {
		return m, nil, err
	}
	if req.Integrity != "" && !h.form.tagged() { // of whatever kind: what it has cannot be changed
		return m, nil, fmt.Errorf("%w: integrity %q", ErrNoIntegrity, req.Integrity)
	}
	if mapped && h.form.tagged() && m.Bytes != h.bytes {
		return m, nil, fmt.Errorf("%w: %s has %d bytes, its header says %d", ErrTableMismatch, m.Name, m.Bytes, h.bytes)
	}
	if mapped {
		err := d.prove(ctx, m, h, dek)
		if !errors.Is(err, errNothingVerifies) || m.InUse {
			return m, h, err
		}
		// Nothing was ever written through it. It is made anew, with the key that is known.
		if err := remove(ctx, req.Name, live.uuid); err != nil {
			return m, nil, err
		}
	}
	if err := d.checkSize(); err != nil {
		return m, nil, err
	}
	m, err = d.activate(ctx, req, h, dek)
	return m, h, err
}

// of is what the options come to for a form.
func (o OpenOptions) of(f *form) OpenOptions {
	if f.tagged() {
		o.Workqueues = true // the MAC is work for more than one processor
	} else {
		o.NoJournal = false
	}
	return o
}

// takes refuses what a form cannot be mapped with.
func (f *form) takes(name string, o OpenOptions) error {
	switch {
	case !f.tagged():
		return nil
	case len(name) > maxAuthenticatedName:
		return fmt.Errorf("%w: the name of a mapping with integrity has at most %d characters", ErrInvalid, maxAuthenticatedName)
	case o.ReadOnly:
		// Mapping it replays the journal and begins a new one, below the feet of
		// another machine that may be writing.
		return fmt.Errorf("%w: a volume with integrity cannot be opened read-only, since its journal is written even then", ErrInvalid)
	case o.AllowDiscards:
		return fmt.Errorf("%w: a volume with integrity cannot pass TRIM on", ErrInvalid)
	}
	return nil
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
func (d *disk) activate(ctx context.Context, req OpenRequest, h *Header, dek *Key) (m Mapping, err error) {
	name, opts := req.Name, req.Options.of(h.form)
	if err := cmp.Or(ctx.Err(), h.form.takes(name, opts)); err != nil {
		return m, err
	}
	if d.readOnly && !opts.ReadOnly {
		return m, fmt.Errorf("%w: %s can be opened read-only", ErrReadOnlyDevice, d.path)
	}
	if h.form.tagged() {
		if err := removeTags(ctx, name, h.uuid); err != nil {
			return m, err
		}
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
	below, offset, bytes := d.rdev, int64(dataOffset), d.plainBytes()
	if h.form.tagged() {
		if req.FreshTags {
			if err := d.makeTags(ctx, name, h.uuid); err != nil {
				return m, err
			}
		}
		if below, err = d.openTags(ctx, name, h.uuid, h.bytes, !opts.NoJournal); err != nil {
			return m, err
		}
		offset, bytes = 0, h.bytes
		defer func() {
			if err != nil {
				_ = removeTags(context.WithoutCancel(ctx), name, h.uuid)
			}
		}()
	}
	c := creation{
		name: name, uuid: dmUUID(h.uuid, name), kind: cryptKind, readOnly: opts.ReadOnly, bytes: bytes,
		params: cryptParams(h.form, h.form.volumeKeyRef(h.uuid), below, offset, opts),
	}
	undo := func() { _ = remove(context.WithoutCancel(ctx), c.name, c.uuid) }
	err = kernelCall(ctx, "mapping "+name, func() error {
		return withVolumeKey(h.uuid, vk, func() error { return c.create(ctx) })
	}, undo)
	if err != nil {
		return m, err
	}
	if m, err = d.confirm(name, h, bytes, opts); err == nil {
		err = cmp.Or(d.soleHolder(), ensureNode(m))
	}
	if err != nil {
		undo()
		return Mapping{}, err
	}
	return m, nil
}

// confirm compares the mapping that was just made with what was asked for.
func (d *disk) confirm(name string, h *Header, bytes int64, opts OpenOptions) (Mapping, error) {
	uuid := h.uuid
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
	case m.Bytes != bytes:
		return Mapping{}, fmt.Errorf("%w: %s has %d bytes, expected are %d", ErrTableMismatch, name, m.Bytes, bytes)
	case m.Integrity != h.form.integrity:
		return Mapping{}, fmt.Errorf("%w: %s has integrity %q, its header %q", ErrTableMismatch, name, m.Integrity, h.form.integrity)
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
