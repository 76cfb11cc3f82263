package luks

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/keyagent/keyagent/luks/probe"
)

// Signature is something that somebody left on a device.
type Signature struct {
	Type   string // blkid's word for it, such as "ext4" or "gpt"
	Usage  string // "filesystem", "raid", "crypto", "other" or "partition table"
	Offset int64  // of its magic, in bytes
	UUID   string
	Label  string
}

func (s Signature) String() string {
	text := "a signature of " + s.Type
	if s.Usage != "" && s.Usage != "other" {
		text += " (" + s.Usage + ")"
	}
	return text
}

const (
	typeLUKS      = "crypto_LUKS"
	typeSwap      = "swap"
	typeExtBackup = "ext2/3/4 backup superblock"
)

// Signatures returns everything that libblkid knows and finds on a device, and
// backups of ext2/3/4 superblocks, at most 76 in all. It changes nothing. A device
// that cannot be read gives an error; no signatures and no error means that there
// are none.
func Signatures(ctx context.Context, device string) ([]Signature, error) {
	d, err := openShared(ctx, device)
	if err != nil {
		return nil, fmt.Errorf("look for signatures on %s: %w", device, err)
	}
	defer d.Close()
	found, err := d.signatures()
	if err != nil {
		return nil, fmt.Errorf("look for signatures on %s: %w", device, err)
	}
	return found, nil
}

func (d *disk) signatures() ([]Signature, error) {
	found, err := d.blkid()
	if err != nil {
		return nil, err
	}
	backups, err := d.extBackups()
	if err != nil {
		return nil, err
	}
	return append(found, backups...), nil
}

// blkid runs libblkid on the device's worker, since it reads the device.
func (d *disk) blkid() ([]Signature, error) {
	if d.file == nil {
		return nil, nil // a test's disk in memory
	}
	if d.size == 0 {
		return nil, fmt.Errorf("%w: %s has no size", ErrIO, d.path)
	}
	var found []probe.Found
	err := d.do(func() (err error) {
		if found, err = probe.Device(int(d.file.Fd())); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrIO, d.path, err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	// libblkid passes over what it cannot read. The places that it looks at first
	// must answer before its silence means anything.
	if err := d.read(make([]byte, min(d.size, 128<<10)), 0); err != nil {
		return nil, err
	}
	all := make([]Signature, len(found))
	for i, f := range found {
		all[i] = Signature(f)
	}
	return all, nil
}

// Where an ext2/3/4 superblock of a block group ends up, and what it says of itself.
const (
	extSuperblock  = 1024
	offExtLogBlock = 0x18
	offExtMagic    = 0x38
	offExtGroup    = 0x5a
	extMagic       = 0xef53
)

// extBackups finds the backups of an ext2/3/4 superblock whose primary is gone, in
// the block groups that have one whatever the filesystem's features.
func (d *disk) extBackups() ([]Signature, error) {
	var found []Signature
	sb := make([]byte, extSuperblock)
	le := binary.LittleEndian
	for logBlock := range uint32(3) {
		block := int64(1024) << logBlock
		for _, group := range []int64{1, 3, 5, 7} {
			at := group * 8 * block * block
			if logBlock == 0 {
				at += block // its first data block is number 1
			}
			if at+extSuperblock > d.size {
				continue
			}
			if err := d.read(sb, at); err != nil {
				return nil, err
			}
			if le.Uint16(sb[offExtMagic:]) == extMagic && le.Uint32(sb[offExtLogBlock:]) == logBlock && int64(le.Uint16(sb[offExtGroup:])) == group {
				found = append(found, Signature{Type: typeExtBackup, Usage: "filesystem", Offset: at + offExtMagic})
			}
		}
	}
	return found, nil
}
