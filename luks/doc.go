// Package luks formats, opens and closes LUKS2 volumes on disks that belong to
// somebody hostile.
//
// In a confidential VM the hypervisor owns the disk, and with it the LUKS2
// header. A header says how to decrypt, so whoever writes it can ask for no
// encryption at all: a null cipher, an offset of its choosing, a key derivation
// that never ends. Stock tools do as they are told. This package reads the header
// once, accepts one form of it, demands a MAC that the host cannot forge, and
// activates the copy that it checked. What it promises:
//
//   - A mapping that [Open] returns is aes-xts-plain64 with a 512-bit volume key,
//     4096-byte sectors and the data at 16 MiB of the device that the header was
//     read from, as the kernel's live table says afterwards.
//   - No mapping is made before the header has satisfied the guard and its MAC,
//     and no key derivation runs: [Adopt], for which there is no MAC yet, runs one
//     of the cost that the guard allows.
//   - [Format] writes to a blank device only, and may be killed at any point. A
//     device that cannot be read is not blank, and neither is a header that does
//     not parse.
//   - A refusal leaves the device as it was and no mapping behind.
//   - Keys pass to C as pointers into locked memory; they are never strings, and
//     never part of an error. The volume key is made by libcryptsetup, reaches
//     dm-crypt through the kernel's keyring, and is dropped from the keyring when
//     the mapping stands.
//
// # A volume's life
//
// The caller keeps a record of each volume that the host cannot change, and is
// the only one that may decide to format:
//
//	state, err := luks.Probe(ctx, device, id, dek)
//	switch {
//	case err != nil:                      // an error is never a new disk
//	case state == luks.StateBlank,        // the record is pending: format it
//		state == luks.StateInterrupted:
//		mac, err = luks.Format(ctx, device, id, dek, luks.FormatOptions{})
//	case state == luks.StateLUKS2:        // the record is pending: the format was completed
//		mac, err = luks.Adopt(ctx, device, id, dek)
//	default:                              // somebody's data
//	}
//	…                                     // the record becomes active, and keeps mac
//	m, err := luks.Open(ctx, device, name, id, mac, dek, luks.OpenOptions{})
//	…
//	err = luks.Close(ctx, name)
//
// A record that is active is opened, and nothing else.
//
// # The guard
//
// Version 1 of the whitelist admits one form of LUKS2 metadata, the one that
// Format writes: two copies of 16 KiB whose checksums (SHA-256) hold and whose
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
// # Header MAC, version 1
//
// The guarded bytes are the first 290816 bytes of the device: both copies of the
// metadata (2 × 16384) and the area of keyslot 0 (258048). With all integers
// big-endian and ‖ for concatenation:
//
//	info = "keyagent luks2 header mac v1"
//	       ‖ uint32(len(volume)) ‖ volume
//	       ‖ uint64(generation)
//	       ‖ uint32(len(uuid)) ‖ uuid           (36 characters, lower case)
//	key  = HKDF-SHA256(IKM = DEK, no salt, info, 32 bytes)
//	MAC  = HMAC-SHA256(key, guarded bytes)
//
// The MAC is not stored on the device. It belongs into the volume's record: a
// host that keeps an old header, with its old MAC, has nothing to show it to.
//
// # Format marker, version 1
//
// One sector at the start of the device, while a format is under way:
//
//	  0  16  "KEYAGENT" 00 "FORMAT" 00
//	 16   4  version, uint32: 1
//	 20   4  zero
//	 24   8  generation, uint64
//	 32  40  UUID, padded with zeros
//	 72 128  volume ID, padded with zeros
//	200 280  zero
//	480  32  HMAC-SHA256 over bytes 0 to 479
//
// Its key is derived as the MAC's is, with "keyagent luks2 format marker v1" in
// place of the label. Format writes the marker and flushes; writes the header but
// for its first sector and flushes; writes the first sector, over the marker, and
// flushes. Whatever it is cut off at, the first sector tells a blank device, an
// interrupted format and a completed one apart. Test vectors for both formats are
// in testdata/vectors.json.
//
// # Concurrency
//
// All functions may be called concurrently. Calls on one volume, and calls on one
// mapping, wait for each other, as long as their contexts allow. libcryptsetup
// keeps state for the whole process and is entered by one call at a time, for
// some milliseconds each; reading, searching and writing devices happens outside.
// A context ends the waiting, and is looked at between steps. It cannot end a read
// that the host never answers.
package luks
