package luks

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Below the dm-crypt mapping of an authenticated volume lies one of dm-integrity,
// which keeps the tag of each sector beside it. It has the name and the UUID that
// libcryptsetup gives it. Its superblock is the host's word: what it says of sizes is
// bounded here, and the tags themselves are dm-crypt's to verify.

// maxAuthenticatedName leaves room in the UUID of the lower mapping.
const maxAuthenticatedName = 76

func tagsName(name string) string { return name + "_dif" }

func tagsUUID(uuid, name string) string {
	return "CRYPT-SUBDEV-" + strings.ReplaceAll(uuid, "-", "") + "-" + tagsName(name)
}

// tagsParams is an integrity target in the words of the kernel. J writes each sector
// with its tag to a journal first, D writes both in place.
func tagsParams(dev DevNum, journal bool) string {
	mode := "D"
	if journal {
		mode = "J"
	}
	return fmt.Sprintf("%v %d %d %s 2 block_size:%d fix_padding", dev, dataOffset/sectorSize, tagSize, mode, dataSectorSize)
}

// tagsOptions are what the kernel may say of such a target: what was asked for, and
// its own choices. None of them touches what dm-crypt verifies.
var tagsOptions = []string{"block_size", "fix_padding", "journal_sectors", "interleave_sectors", "buffer_sectors", "journal_watermark", "commit_time"}

// checkTags holds the lower mapping against the one table that it may have, and says
// where it lies and whether it keeps a journal.
func checkTags(m liveMapping, name, uuid string) (dev DevNum, journal bool, err error) {
	wrong := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s: %s", ErrTableMismatch, tagsName(name), fmt.Sprintf(format, args...))
	}
	if m.uuid != tagsUUID(uuid, name) {
		return dev, false, wrong("it has the UUID %.100q", m.uuid)
	}
	if len(m.table) != 1 || m.table[0].kind != "integrity" || m.table[0].start != 0 {
		return dev, false, wrong("it is not one integrity target at sector 0")
	}
	fields := strings.Fields(m.table[0].params)
	if len(fields) < 5 {
		return dev, false, wrong("it has %d fields", len(fields))
	}
	if dev, err = parseDevNum(fields[0]); err != nil {
		return dev, false, wrong("data device is %q", fields[0])
	}
	if fields[1] != strconv.Itoa(dataOffset/sectorSize) {
		return dev, false, wrong("it begins at sector %s, expected is %d", fields[1], dataOffset/sectorSize)
	}
	if fields[2] != strconv.Itoa(tagSize) {
		return dev, false, wrong("its tags have %s bytes, expected are %d", fields[2], tagSize)
	}
	if fields[3] != "J" && fields[3] != "D" {
		return dev, false, wrong("its mode is %q", fields[3])
	}
	if fields[4] != strconv.Itoa(len(fields)-5) {
		return dev, false, wrong("it counts %s options and has %d", fields[4], len(fields)-5)
	}
	for _, o := range fields[5:] {
		if key, _, _ := strings.Cut(o, ":"); !slices.Contains(tagsOptions, key) {
			return dev, false, wrong("option %q is not expected", o)
		}
	}
	if !slices.Contains(fields[5:], fmt.Sprintf("block_size:%d", dataSectorSize)) {
		return dev, false, wrong("its block size is not %d", dataSectorSize)
	}
	return dev, fields[3] == "J", nil
}

// Fields of dm-integrity's superblock, little-endian (Linux, drivers/md/dm-integrity.c).
const (
	tagsMagic = "integrt\x00"

	offTagsVersion  = 8
	offTagsTagSize  = 10
	offTagsProvided = 16
	offTagsFlags    = 24
	offTagsBlock    = 28

	tagsMaxVersion   = 6
	tagsFixedPadding = 1 << 3 // the one flag that a superblock of ours has
	tagsLog2Block    = 3      // sectors of 4096 bytes
)

// provided reads from the superblock how much room for data dm-integrity offers, in
// bytes.
func (d *disk) provided() (int64, error) {
	if err := d.forget(dataOffset, superblockSize); err != nil {
		return 0, err
	}
	sb := make([]byte, sectorSize)
	if err := d.read(sb, dataOffset); err != nil {
		return 0, err
	}
	return parseSuperblock(sb, d.size-dataOffset)
}

// parseSuperblock checks the superblock of an area of that many bytes.
func parseSuperblock(sb []byte, room int64) (int64, error) {
	le := binary.LittleEndian
	no := func(where, found string) (int64, error) { return 0, refuse(RuleIntegrity, "tags' "+where, found) }
	if string(sb[:len(tagsMagic)]) != tagsMagic {
		return no("magic", string(sb[:len(tagsMagic)]))
	}
	if v := sb[offTagsVersion]; v == 0 || v > tagsMaxVersion {
		return no("version", strconv.Itoa(int(v)))
	}
	if n := le.Uint16(sb[offTagsTagSize:]); n != tagSize {
		return no("size", strconv.Itoa(int(n)))
	}
	if f := le.Uint32(sb[offTagsFlags:]); f != tagsFixedPadding {
		return no("flags", strconv.FormatUint(uint64(f), 16))
	}
	if n := sb[offTagsBlock]; n != tagsLog2Block {
		return no("block size", strconv.Itoa(int(n)))
	}
	sectors := le.Uint64(sb[offTagsProvided:])
	if sectors == 0 || sectors%(dataSectorSize/sectorSize) != 0 || sectors > uint64(max(room, 0))/sectorSize {
		return no("number of sectors", strconv.FormatUint(sectors, 10))
	}
	return int64(sectors) * sectorSize, nil
}

// makeTags has the kernel lay out an area for tags on a device whose data area holds
// nothing that anybody needs. What is below the tags stays: a sector gives an error
// until it is written.
func (d *disk) makeTags(ctx context.Context, name, uuid string) error {
	w, err := openWritable(ctx, d.path)
	if err != nil {
		return err
	}
	defer w.Close()
	if w.rdev != d.rdev {
		return fmt.Errorf("%w: %s is another device now", ErrVolumeMismatch, d.path)
	}
	if err := w.writeDurably(make([]byte, superblockSize), dataOffset); err != nil {
		return err
	}
	if err := w.forget(dataOffset, superblockSize); err != nil {
		return err
	}
	w.Close()
	// The kernel makes a superblock where there is none, for all of the device,
	// whatever the length of the mapping.
	c := tagsCreation(name, uuid, d.rdev, dataSectorSize, true)
	return kernelCall(ctx, "laying out the tags of "+name, func() error {
		if err := c.create(ctx); err != nil {
			return err
		}
		return remove(ctx, c.name, c.uuid)
	}, nil)
}

func tagsCreation(name, uuid string, dev DevNum, bytes int64, journal bool) creation {
	return creation{name: tagsName(name), uuid: tagsUUID(uuid, name), kind: "integrity", bytes: bytes, params: tagsParams(dev, journal)}
}

// openTags maps the tags of an authenticated volume of that length. On an error there is
// no mapping.
func (d *disk) openTags(ctx context.Context, name, uuid string, bytes int64, journal bool) (lower DevNum, err error) {
	room, err := d.provided()
	if err != nil {
		return lower, err
	}
	if room < bytes {
		return lower, fmt.Errorf("%w: it has tags for %d bytes, and the volume has %d", ErrShrink, room, bytes)
	}
	c := tagsCreation(name, uuid, d.rdev, bytes, journal)
	undo := func() { _ = remove(context.WithoutCancel(ctx), c.name, c.uuid) }
	if err := kernelCall(ctx, "mapping "+c.name, func() error { return c.create(ctx) }, undo); err != nil {
		return lower, err
	}
	live, err := inspect(c.name)
	if err == nil {
		err = ensureNode(Mapping{Path: mapperPath(c.name), Device: live.dev})
	}
	if err != nil {
		undo()
		return lower, err
	}
	return live.dev, nil
}

// removeTags removes the lower mapping of a volume, if there is one that nothing
// holds: one that was left when a process was killed, or when the upper one went.
func removeTags(ctx context.Context, name, uuid string) error {
	return cmp.Or(removeProof(ctx, name, uuid), removeBelow(ctx, tagsName(name), tagsUUID(uuid, name)))
}

// removeBelow removes a mapping that goes with a volume's, if it is there.
func removeBelow(ctx context.Context, lower, uuid string) error {
	live, err := inspect(lower)
	switch {
	case errors.Is(err, ErrNotActive):
		return nil
	case err != nil:
		return err
	case live.uuid != uuid:
		return nil // somebody else's
	}
	// Something that looks at new devices may have it open for a moment.
	for range 20 {
		err = kernelCall(ctx, "removing "+lower, func() error { return remove(ctx, lower, live.uuid) }, nil)
		if !errors.Is(err, ErrDeviceBusy) || ctx.Err() != nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if errors.Is(err, ErrNotActive) { // an earlier call that was given up came to its end
		err = nil
	}
	if err == nil {
		dropNode(lower, live.dev)
	}
	return err
}

// suspendTags stops the lower mapping once the upper one is stopped. The kernel writes its
// journal in place then, while that is allowed: a table that is exchanged later writes
// nothing.
func suspendTags(name, uuid string) error {
	_, err := dmCall{command: dmDevSuspend, uuid: tagsUUID(uuid, name), flags: dmSuspended | dmSkipLockFS}.run()
	if err != nil {
		return fmt.Errorf("stop %s: %w", tagsName(name), err)
	}
	return nil
}

// cutTags takes the lower mapping of a volume off its disk, too. Unless it was suspended
// before, the kernel writes its journal in place first.
func cutTags(ctx context.Context, name, uuid string) error {
	live, err := inspect(tagsName(name))
	if errors.Is(err, ErrNotActive) || err == nil && live.uuid != tagsUUID(uuid, name) {
		return nil
	}
	if err != nil {
		return err
	}
	sectors, err := liveSectors(live, tagsName(name))
	if err != nil {
		return err
	}
	return intoError(ctx, live, tagsName(name), sectors)
}
