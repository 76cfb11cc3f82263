package luks

import (
	"context"
	"encoding/binary"
	"hash/crc32"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// lvmLabel is the label sector of an LVM physical volume, with its checksum.
func lvmLabel() []byte {
	p := make([]byte, sectorSize)
	copy(p, "LABELONE")
	le := binary.LittleEndian
	le.PutUint64(p[8:], 1) // its sector
	le.PutUint32(p[20:], 32)
	copy(p[24:], "LVM2 001")
	copy(p[32:], "abcdefghijklmnopqrstuvwxyz012345")
	crc := uint32(0xf597a6cf)
	for _, b := range p[20:] { // CRC-32, reflected, with LVM's own start
		crc ^= uint32(b)
		for range 8 {
			crc = crc>>1 ^ 0xedb88320&-(crc&1)
		}
	}
	le.PutUint32(p[16:], crc)
	return p
}

// gpt is an empty GUID partition table, from its header on.
func gpt() []byte {
	p := make([]byte, sectorSize+128*128)
	copy(p, "EFI PART\x00\x00\x01\x00\x5c\x00\x00\x00")
	le := binary.LittleEndian
	for at, v := range map[int]uint64{24: 1, 32: 100000, 40: 34, 48: 99000, 56: 1, 72: 2} {
		le.PutUint64(p[at:], v)
	}
	le.PutUint32(p[80:], 128)
	le.PutUint32(p[84:], 128)
	le.PutUint32(p[88:], crc32.ChecksumIEEE(p[sectorSize:]))
	le.PutUint32(p[16:], crc32.ChecksumIEEE(p[:92]))
	return p
}

// holders are the tenants that a first format must find, whatever else it looks at,
// and the word of blkid's that must be in the refusal.
var holders = []struct {
	name string
	make func(t testing.TB, path string)
	word string
}{
	{"ext4", tool("mkfs.ext4", "-q", "-F"), "ext4"},
	{"ext4 without checksums", tool("mkfs.ext4", "-q", "-F", "-O", "^metadata_csum,^64bit"), "ext4"},
	{"ext2 of the first kind", tool("mkfs.ext2", "-q", "-F", "-r", "0", "-O", "none"), "ext2"},
	{"xfs", tool("mkfs.xfs", "-q", "-f"), "xfs"},
	{"btrfs", tool("mkfs.btrfs", "-q", "-f"), "btrfs"},
	{"swap", tool("mkswap"), "swap"},
	{"a GPT", func(t testing.TB, path string) { patch(t, path, gpt(), 512) }, "gpt"},
	{"an LVM physical volume", func(t testing.TB, path string) { patch(t, path, lvmLabel(), 512) }, "LVM2_member"},
	{"ext4 whose first 32 MiB are gone", func(t testing.TB, path string) {
		tool("mkfs.ext4", "-q", "-F", "-b", "4096")(t, path)
		patch(t, path, make([]byte, blankHead), 0)
	}, "backup superblock"},
	{"a backup of an ext4 superblock alone", func(t testing.TB, path string) {
		sb := make([]byte, extSuperblock)
		le := binary.LittleEndian
		le.PutUint16(sb[offExtMagic:], extMagic)
		le.PutUint32(sb[offExtLogBlock:], 2)
		le.PutUint16(sb[offExtGroup:], 1)
		patch(t, path, sb, 128<<20)
	}, "backup superblock"},
}

func tool(command string, args ...string) func(testing.TB, string) {
	return func(t testing.TB, path string) {
		t.Helper()
		if out, err := exec.Command(command, append(args, path)...).CombinedOutput(); err != nil {
			t.Fatalf("%s is needed (`make deps`): %v: %s", command, err, out)
		}
	}
}

// Case 51: whatever libblkid knows is something that somebody may miss.
func TestWhatLibblkidKnowsIsNeverFormatted(t *testing.T) {
	ctx := context.Background()
	for _, h := range holders {
		t.Run(h.name, func(t *testing.T) {
			path := image(t, 320<<20)
			h.make(t, path)
			err := CheckBlank(ctx, path)
			wantError(t, err, ErrNotBlank)
			if !strings.Contains(err.Error(), h.word) {
				t.Errorf("error is %q, want %q in it", err, h.word)
			}
			_, err = formatImage(path, idData, dataKey(t))
			wantError(t, err, ErrNotBlank)
			t.Log(err)
			found, err := Signatures(ctx, path)
			must(t, err)
			if len(found) == 0 || !strings.Contains(found[0].String(), h.word) {
				t.Errorf("signatures are %+v", found)
			}
		})
	}
}

func TestABlankDiskHasNoSignatures(t *testing.T) {
	found, err := Signatures(context.Background(), image(t, 320<<20))
	if err != nil || len(found) != 0 {
		t.Errorf("signatures are %+v, %v", found, err)
	}
}

// What cannot be read is not blank, and neither is what has no size.
func TestADiskThatCannotBeLookedAtHasNoAnswer(t *testing.T) {
	_, err := Signatures(context.Background(), image(t, 0))
	wantError(t, err, ErrIO)
	r := newRAM(320 << 20)
	r.failFrom, r.readErr = 128<<20, unix.EIO
	_, err = r.disk().signatures()
	wantError(t, err, ErrIO)
}
