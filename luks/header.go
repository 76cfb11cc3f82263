package luks

import (
	"cmp"
	"context"
	"fmt"
	"io"

	"github.com/keyagent/keyagent/internal/secret"
)

// Header is an authentic header in memory: one that this package made, that matched
// its MACs, or that the DEK has opened. Only such a header is ever activated or
// written. It is not secret, and does not change.
type Header struct {
	raw     []byte // the guarded bytes
	uuid    string
	form    *form
	bytes   int64 // of a volume with integrity
	macs    MACs
	damaged int // the copy on the disk that was bad, or undamaged

	source *source // of one that is made for a clone
}

const undamaged = -1

// BackupSize is the length of a backup file: the header area of the device. Stock
// cryptsetup restores such a file with luksHeaderRestore.
const BackupSize = dataOffset

// MACs returns what the volume's record has to keep.
func (h *Header) MACs() MACs { return h.macs }

// UUID returns the UUID of the volume.
func (h *Header) UUID() string { return h.uuid }

// Integrity says how the volume's data is authenticated.
func (h *Header) Integrity() Integrity { return h.form.integrity }

// Length is how many bytes of data a volume with integrity has; 0 without.
func (h *Header) Length() int64 { return h.bytes }

// Bytes returns a copy of the first bytes of the device, as they should be: 290816, or
// 417792 with HMAC-SHA256, or 98304 with AEGIS-128.
func (h *Header) Bytes() []byte { return append([]byte(nil), h.raw...) }

// WriteBackup writes a backup file of [BackupSize] bytes: the header, then zeros.
func (h *Header) WriteBackup(w io.Writer) error {
	if _, err := w.Write(h.raw); err != nil {
		return err
	}
	_, err := w.Write(make([]byte, BackupSize-len(h.raw)))
	return err
}

// Damaged names the copy that was bad on the disk when the header was read,
// "primary" or "secondary", and says whether one was. [RebuildCopy] repairs it.
func (h *Header) Damaged() (copy string, damaged bool) {
	if h.damaged == undamaged {
		return "", false
	}
	return copyNames[h.damaged], true
}

// Layout is how a new volume's data lies on its device. The zero value is plain.
type Layout struct {
	Integrity Integrity
	// DeviceBytes is the size of the device. A volume with integrity has a length from
	// the start, [Room] of it, which its header says; another one may leave it out.
	DeviceBytes int64
}

// NewHeader makes a header in memory, with a fresh volume key in a keyslot under
// the DEK. Its MACs go into the volume's record before [Write] puts it on a disk.
func NewHeader(ctx context.Context, id Identity, l Layout, dek *Key) (*Header, error) {
	h, err := newHeader(ctx, id, l, dek)
	if err != nil {
		return nil, fmt.Errorf("make header of volume %q: %w", id.Volume, err)
	}
	return h, nil
}

func newHeader(ctx context.Context, id Identity, l Layout, dek *Key) (*Header, error) {
	f, err := formOf(l.Integrity)
	if err := cmp.Or(err, id.validate(), validateKey(dek)); err != nil {
		return nil, err
	}
	bytes := Room(l.DeviceBytes, l.Integrity)
	if f.tagged() && bytes < minDataSize {
		return nil, fmt.Errorf("%w: it has %d bytes, needed are %d with integrity", ErrDeviceSize, l.DeviceBytes, Need(minDataSize, l.Integrity))
	}
	return makeHeader(ctx, id, content{form: f, bytes: bytes}, dek)
}

func makeHeader(ctx context.Context, id Identity, c content, dek *Key) (*Header, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if c.key == nil {
		fresh, err := secret.Random(c.form.keySize)
		if err != nil {
			return nil, err
		}
		defer fresh.Close()
		c.key = fresh
	}
	made, err := newHeaderCopy()
	if err != nil {
		return nil, err
	}
	defer made.Close()
	err = withSession(made.path(), func(s *session) error {
		if c.form.tagged() {
			if err := s.format(id.UUID, nil); err != nil {
				return err
			}
			return s.addUnboundKeyslot(c.key, dek)
		}
		if err := s.format(id.UUID, c.key); err != nil {
			return err
		}
		return s.addKeyslot(dek)
	})
	if err != nil {
		return nil, err
	}
	raw, err := made.guardedBytes(c.form)
	if err == nil && c.form.tagged() {
		err = bindKeyslot(raw, c.form, c.bytes)
	}
	if err != nil {
		return nil, err
	}
	pairSalts(raw)
	// It is held against the guard and the DEK like one from a disk.
	h, err := vouch(raw, id, dek)
	if err != nil {
		return nil, fmt.Errorf("check the header just made: %w", err)
	}
	return h, nil
}

// vouch accepts a header that has no MAC yet because the DEK opens its keyslot.
func vouch(raw []byte, id Identity, dek *Key) (*Header, error) {
	g, err := guard(raw)
	if err != nil {
		return nil, err
	}
	if g.uuid != id.UUID {
		return nil, mismatch(g, id)
	}
	h := &Header{raw: g.raw, uuid: g.uuid, form: g.form, bytes: g.bytes, damaged: undamaged}
	if err := h.opens(dek); err != nil {
		return nil, err
	}
	if h.macs, err = headerMACs(g, id, dek); err != nil {
		return nil, err
	}
	if !paired(raw) { // of version 1: its copies do not make each other
		h.macs.Copies = [2]MAC{}
	}
	return h, nil
}

// paired says whether a header is of version 2.
func paired(raw []byte) bool {
	for i := offSalt; i < offUUID; i++ {
		if raw[i] != ^raw[metadataSize+i] {
			return false
		}
	}
	return true
}

// opens says whether the DEK opens the keyslot, which also verifies its digest. It
// maps nothing.
func (h *Header) opens(dek *Key) error {
	return h.withSession(func(s *session) error { return s.test(dek) })
}

// volumeKey returns the key that the header's keyslot holds.
func (h *Header) volumeKey(dek *Key) (vk *secret.Bytes, err error) {
	err = h.withSession(func(s *session) error {
		vk, err = s.volumeKey(h.form.keySize, dek)
		return err
	})
	return vk, err
}

// withSession hands libcryptsetup a sealed copy of the header.
func (h *Header) withSession(f func(*session) error) error {
	held, err := copyOf(h)
	if err != nil {
		return err
	}
	defer held.Close()
	return withSession(held.path(), func(s *session) error {
		if err := s.load(h.uuid); err != nil {
			return err
		}
		return f(s)
	})
}

// HeaderRequest names the header of a volume: the device that it is on, and what the
// volume's record says of it.
type HeaderRequest struct {
	Device   string
	Identity Identity
	MACs     MACs
}

func (r HeaderRequest) validate(dek *Key) error {
	return cmp.Or(r.Identity.validate(), validateKey(dek), r.MACs.validate())
}

// ReadHeader reads a volume's header. It must satisfy the guard, carry the volume's
// UUID and match its MACs under dek. If exactly one copy is damaged, the header is
// rebuilt in memory from the other, and [Header.Damaged] names the damaged one.
// Nothing is written.
func ReadHeader(ctx context.Context, req HeaderRequest, dek *Key) (*Header, error) {
	h, err := readHeader(ctx, req, dek)
	if err != nil {
		return nil, fmt.Errorf("read header of volume %q: %w", req.Identity.Volume, err)
	}
	return h, nil
}

func readHeader(ctx context.Context, req HeaderRequest, dek *Key) (*Header, error) {
	if err := req.validate(dek); err != nil {
		return nil, err
	}
	d, err := openShared(ctx, req.Device)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.examine(req.Identity, req.MACs, dek)
}

// examine reads the header and accepts it or says why not.
func (d *disk) examine(id Identity, want MACs, dek *Key) (*Header, error) {
	raw, err := d.readGuarded()
	if err != nil {
		return nil, err
	}
	return verify(raw, id, want, dek)
}

// Adopt returns a complete header for a record that has no MACs yet: it was
// written, and the word of it was lost. The header must satisfy the guard, carry
// the UUID of id, and its keyslot must open with dek, which only somebody who knows
// dek can have arranged. Adopt writes nothing of its own; it flushes the device, so
// that the header it vouches for stays.
//
// A record that has MACs is never adopted for: that would accept any older
// header of the same volume.
func Adopt(ctx context.Context, device string, id Identity, dek *Key) (*Header, error) {
	h, err := adopt(ctx, device, id, dek)
	if err != nil {
		return nil, fmt.Errorf("adopt header of volume %q: %w", id.Volume, err)
	}
	return h, nil
}

func adopt(ctx context.Context, device string, id Identity, dek *Key) (*Header, error) {
	if err := cmp.Or(id.validate(), validateKey(dek)); err != nil {
		return nil, err
	}
	release, err := volumes.acquire(ctx, id.Volume)
	if err != nil {
		return nil, err
	}
	defer release()
	d, err := openShared(ctx, device)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.adopt(id, dek)
}

func (d *disk) adopt(id Identity, dek *Key) (*Header, error) {
	if err := d.checkSize(); err != nil {
		return nil, err
	}
	// The writer may have been killed before its last flush. What is adopted
	// must not be lost with the power afterwards.
	if err := d.flushAndForget(); err != nil {
		return nil, err
	}
	raw, err := d.readGuarded()
	if err != nil {
		return nil, err
	}
	return vouch(raw, id, dek)
}

// HeaderSize is how much of a backup file is the header at most, in bytes.
const HeaderSize = maxGuardedSize

// DataOffset is where the data begins on a volume's device, in bytes: the volume is that
// much smaller.
const DataOffset = dataOffset
