package luks

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/internal/secret"
)

// A disk that was cloned, or restored from a snapshot, has its source's header: another
// volume's. It becomes a volume of its own with a header of its own, in which the key of
// the data is the one that the source has, under another DEK. A copy of the source's
// header stays between header and data until that is done: without it, a power cut in the
// middle would take the key away.

// sourceOffset is where that copy stands, and cloneMagic begins the mark behind it.
const (
	sourceOffset = 8 << 20
	cloneMagic   = "KEYAGENT\x00CLONE\x00\x00"
)

// Source is the volume of which a disk is a clone: what its record says of it.
type Source struct {
	Identity Identity
	MACs     MACs
}

// source is the header of a clone's source.
type source struct {
	header *Header
	found  []byte // the guarded bytes as they stand on the disk, one copy of which may be damaged
}

// NewCloneHeader makes a header in memory for a disk that is a clone of another volume:
// with the key of the source's data, in a keyslot under the DEK of id. It is for [Write],
// which then replaces the source's header and nothing else. The source's DEK is needed for
// this alone.
//
// It gives the errors of [ReadHeader] for the source, as ErrVolumeMismatch for a clone of
// something else. A disk on which an earlier attempt for id was cut off is as good as the
// clone.
func NewCloneHeader(ctx context.Context, device string, of Source, sourceDEK *Key, id Identity, dek *Key) (*Header, error) {
	h, err := newCloneHeader(ctx, device, of, sourceDEK, id, dek)
	if err != nil {
		return nil, fmt.Errorf("make header of volume %q from its source %q: %w", id.Volume, of.Identity.Volume, err)
	}
	return h, nil
}

func newCloneHeader(ctx context.Context, device string, of Source, sourceDEK *Key, id Identity, dek *Key) (*Header, error) {
	if err := cmp.Or(id.validate(), validateKey(dek), of.Identity.validate(), validateKey(sourceDEK), of.MACs.validate()); err != nil {
		return nil, err
	}
	if id.UUID == of.Identity.UUID || id.Volume == of.Identity.Volume {
		return nil, fmt.Errorf("%w: a volume is no clone of itself", ErrInvalid)
	}
	d, err := openShared(ctx, device)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	if err := d.checkSize(); err != nil {
		return nil, err
	}
	src, err := d.source(of, sourceDEK, id, dek)
	if err != nil {
		return nil, err
	}
	if need := Need(src.header.bytes, src.header.form.integrity); src.header.form.tagged() && d.size < need {
		return nil, fmt.Errorf("%w: it has %d bytes, its source's tags and data need %d", ErrDeviceSize, d.size, need)
	}
	vk, err := src.header.volumeKey(sourceDEK)
	if err != nil {
		return nil, err
	}
	defer vk.Close()
	h, err := makeHeader(ctx, id, content{form: src.header.form, bytes: src.header.bytes, key: vk}, dek)
	if err != nil {
		return nil, err
	}
	h.source = src
	return h, nil
}

// source reads the header of a clone's source where it stands: in front, or where an
// earlier attempt of id kept it.
func (d *disk) source(of Source, sourceDEK *Key, id Identity, dek *Key) (*source, error) {
	raw, err := d.readGuarded()
	if err != nil {
		return nil, err
	}
	at := int64(0)
	if ours, err := d.begun(raw, id, dek); err != nil {
		return nil, err
	} else if ours {
		at = sourceOffset
		if err := d.read(raw, at); err != nil {
			return nil, err
		}
	}
	h, err := verify(raw, of.Identity, of.MACs, sourceDEK)
	if err != nil {
		return nil, err
	}
	return &source{header: h, found: raw[:h.form.size()]}, nil
}

// begun says whether an attempt for id has written to a clone: its marker stands there, or
// its header.
func (d *disk) begun(raw []byte, id Identity, dek *Key) (bool, error) {
	ours, err := markerVerifies(raw[:sectorSize], id, dek)
	if err != nil || ours {
		return ours, err
	}
	switch _, err := vouch(raw, id, dek); {
	case err == nil:
		return true, nil
	case errors.Is(err, ErrHeaderRefused), errors.Is(err, ErrVolumeMismatch), errors.Is(err, ErrWrongKey):
		return false, nil
	default:
		return false, err
	}
}

// mayReplaceSource is mayReplace of a clone: what is replaced is the source's header, or
// an earlier attempt beside which a copy of that stands.
func (d *disk) mayReplaceSource(id Identity, dek *Key, h *Header) (stands bool, err error) {
	raw, err := d.readGuarded()
	if err != nil {
		return false, err
	}
	if bytes.HasPrefix(raw, h.raw) {
		return true, nil
	}
	if bytes.HasPrefix(raw, h.source.found) {
		return false, nil
	}
	ours, err := d.begun(raw, id, dek)
	if err != nil {
		return false, err
	}
	kept := make([]byte, len(h.source.header.raw))
	if err := d.read(kept, sourceOffset); err != nil {
		return false, err
	}
	if !ours || !bytes.Equal(kept, h.source.header.raw) {
		return false, &NotBlankError{Found: "something else than the clone's source"}
	}
	return false, nil
}

// keepSource puts a copy of the source's header where the new header does not reach, and
// behind it a mark that only who has the new volume's DEK can make.
func (d *disk) keepSource(id Identity, dek *Key, h *Header) error {
	mark, err := taggedSector(cloneMagic, cloneLabel, id, nil, dek)
	if err != nil {
		return err
	}
	kept := make([]byte, maxGuardedSize, maxGuardedSize+sectorSize)
	copy(kept, h.source.header.raw)
	return d.writeDurably(append(kept, mark...), sourceOffset)
}

// SourceKept says whether such a copy is on the device: the volume is made of a clone, and
// that is not finished.
func SourceKept(ctx context.Context, device string, id Identity, dek *Key) (bool, error) {
	want, err := taggedSector(cloneMagic, cloneLabel, id, nil, dek)
	if err != nil {
		return false, err
	}
	d, err := openShared(ctx, device)
	if err != nil {
		return false, fmt.Errorf("look for a clone's mark: %w", err)
	}
	defer d.Close()
	mark, err := d.cloneMark()
	if err != nil {
		return false, fmt.Errorf("look for a clone's mark: %w", err)
	}
	return hmac.Equal(mark, want), nil
}

func (d *disk) cloneMark() ([]byte, error) {
	mark := make([]byte, sectorSize)
	return mark, d.read(mark, sourceOffset+maxGuardedSize)
}

// ForgetSource removes the copy of its source's header from a volume that was a clone,
// once its own header stands in its record. Without one there is nothing to do.
func ForgetSource(ctx context.Context, device string) error {
	if err := forgetSource(ctx, device); err != nil {
		return fmt.Errorf("remove what is left of a clone's source: %w", err)
	}
	return nil
}

func forgetSource(ctx context.Context, device string) error {
	look, err := openShared(ctx, device)
	if err != nil {
		return err
	}
	defer look.Close()
	if mark, err := look.cloneMark(); err != nil || !bytes.HasPrefix(mark, []byte(cloneMagic)) {
		return err
	}
	d, err := openWritable(ctx, device)
	if err != nil {
		return err
	}
	defer d.Close()
	if d.rdev != look.rdev {
		return fmt.Errorf("%w: %s is another device now", ErrVolumeMismatch, device)
	}
	return d.forgetSource()
}

// forgetSource removes the mark last: while it is there, something may be left.
func (d *disk) forgetSource() error {
	if err := d.writeDurably(make([]byte, maxGuardedSize), sourceOffset); err != nil {
		return err
	}
	return d.writeDurably(make([]byte, sectorSize), sourceOffset+maxGuardedSize)
}

// isLUKS2 says whether a sector begins as a primary header of LUKS2 does.
func isLUKS2(sector []byte) bool { return bytes.HasPrefix(sector, []byte("LUKS\xba\xbe\x00\x02")) }

// content is what a header is made for. Without a key it gets a fresh one.
type content struct {
	form  *form
	bytes int64 // of a volume with integrity
	key   *secret.Bytes
}
