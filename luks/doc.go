// Package luks formats, opens and closes LUKS2 volumes on disks that belong to
// somebody hostile.
//
// In a confidential VM the hypervisor owns the disk, and with it the LUKS2
// header. A header says how to decrypt, so its writer can ask for no
// encryption at all: a null cipher, an offset of its choosing, a key derivation
// that never ends. Stock tools do as they are told. This package reads the header
// once, accepts one form of it, demands a MAC that the host cannot forge, and
// activates the copy that it checked. What it promises:
//
//   - A mapping that [Open] returns is aes-xts-plain64 with a 512-bit volume key,
//     4096-byte sectors and the data at 16 MiB of the device that the header was
//     read from, as the kernel's live table says afterwards. With [HMACSHA256] it
//     also verifies a tag of each sector, which a dm-integrity mapping below it keeps;
//     with [AEGIS128] that cipher does both, in place of aes-xts-plain64.
//     A mapping that was there before is adopted only if it decrypts with the key of
//     the guarded header.
//   - No mapping is made before the header has satisfied the guard and its MAC,
//     and no key derivation runs: [Adopt], for which there is no MAC yet, runs one
//     of the cost that the guard allows.
//   - [Write] writes to a blank block device only, and may be killed at any point. A
//     device that cannot be read is not blank, and neither is a header that does
//     not parse. What libblkid knows is something that somebody may miss.
//   - A refusal leaves the device as it was and no mapping behind.
//   - Keys pass to C as pointers into locked memory; they are never strings, and
//     never part of an error. The volume key reaches dm-crypt through the keyring of
//     one thread, and is dropped from it when the mapping stands.
//   - A device that does not answer costs its own callers their patience
//     ([ErrDeviceHung]), and nobody else anything.
//
// # A volume's life
//
// The caller keeps a record of each volume that the host cannot change, and is
// the only one that may decide to format:
//
//	h, err := luks.NewHeader(ctx, id, luks.Layout{}, dek)      // in memory
//	until := luks.DeadlineIn(2 * time.Minute)   // counted from before the next line
//	…                                           // the record names this attempt and h.MACs()
//	err = luks.Write(ctx, luks.WriteRequest{device, id, h, until}, dek)
//	…                                           // the record says: the header stands
//	m, h, err := luks.Open(ctx, luks.OpenRequest{…, MACs: h.MACs()}, dek)
//	err = mark.Claim(ctx, device, nil)          // if it is to have a filesystem
//	…                                           // mkfs
//	err = mark.Clear(ctx, device)
//	…                                           // the record says: active, and keeps the MACs
//	err = luks.Close(ctx, luks.CloseRequest{Name: m.Name, UUID: m.UUID, Device: m.DataDevice})
//
// An attempt that finds a header of a forgotten one asks [Adopt] for it, or has
// Write replace it, which needs a data area that nobody has written to. The [FilesystemMark] tells a filesystem that was never finished
// from one that is used. A record that is active is opened, and nothing else.
//
// While a volume is open, [Matches] compares the header on the disk with the one in
// memory, and [WriteBack] puts it back. [Suspend] and [Resume] stop a volume and wipe
// its key, [Resize] lets it grow, and [Reserve] keeps other machines' writes away
// from a disk that can do that. [OpenThrowaway] is for swap and scratch space.
//
// # The guard
//
// Version 1 of the whitelist admits one form of LUKS2 metadata, the one that
// NewHeader makes of a plain [Layout], and version 2 that of a volume with integrity,
// which docs/spec/luks2-header.md describes. Version 1: two copies of 16 KiB whose checksums (SHA-256) hold and whose
// sequence numbers, UUIDs and JSON areas agree; no label, no subsystem, unused
// bytes zero. The JSON has one keyslot (PBKDF2-SHA256 with 1000 iterations, 64
// bytes under aes-xts-plain64, 4000 stripes, in its exact place), one segment,
// one digest (PBKDF2-SHA256 with 1000 iterations), no tokens, flags or
// requirements; every member is named by the whitelist and stands there once, and
// the text is printable ASCII without blanks or escapes, so that no two parsers
// can read it differently. The keyslot's cost is the least that libcryptsetup
// accepts, because a DEK has full entropy; the whitelist is thereby also the cap
// on what a header may cost. A refusal is a [HeaderError] that names its [Rule].
//
// # Formats
//
// The MACs of the header and of its copies, the rebuilding of a copy, the format
// marker, the filesystem mark and the mark of a clone are specified in docs/spec/luks2-header.md. Test
// vectors are in testdata/vectors.json.
//
// # Concurrency
//
// All functions may be called concurrently. Calls on one volume, and calls on one
// mapping, wait for each other, as long as their contexts allow. libcryptsetup
// keeps state for the whole process and is entered by one call at a time, for
// some milliseconds each; it sees headers in memory and no device. Each open device
// has a thread of its own. A context, or the patience that [WithPatience] sets, ends
// the waiting for it; the thread is left behind until the device answers, and the
// device is not asked again before that. A process that exits does not wait for it,
// unless it was writing.
package luks
