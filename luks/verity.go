package luks

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Verity is a mapping of dm-verity: the kernel checks each block of it that is read
// against the root hash.
type Verity struct {
	Bytes    int64
	RootHash string // lower-case hex
}

// verityOptions are those of dm-verity's table under which each block that is read is
// checked, with how many words follow them. ignore_corruption hands out what is not
// the image's, and check_at_most_once what the host has put there since.
var verityOptions = map[string]int{
	"restart_on_corruption": 0, "panic_on_corruption": 0, "restart_on_error": 0, "panic_on_error": 0, "ignore_zero_blocks": 0,
	"try_verify_in_tasklet": 0, "root_hash_sig_key_desc": 1,
	"use_fec_from_device": 1, "fec_roots": 1, "fec_blocks": 1, "fec_start": 1,
}

// ReadVerity returns what the kernel says of a dm-verity mapping. Any other device, and
// a mapping that hands out blocks which were not checked, is [ErrTableMismatch].
func ReadVerity(n DevNum) (Verity, error) {
	name, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%s/dm/name", n))
	if err != nil {
		return Verity{}, fmt.Errorf("%w: %s is not a mapping: %w", ErrTableMismatch, n, err)
	}
	m, err := inspect(strings.TrimSuffix(string(name), "\n"))
	if err != nil {
		return Verity{}, err
	}
	if m.dev != n || m.empty || !m.readOnly {
		return Verity{}, fmt.Errorf("%w: %s is writable, has no table, or is another mapping by now", ErrTableMismatch, n)
	}
	return parseVerity(m.table)
}

// parseVerity reads a table, see admin-guide/device-mapper/verity.rst in the kernel's
// sources: version, data device, hash device, the sizes of their blocks, the number of
// data blocks, where the hashes start, hash, root hash, salt, and options.
func parseVerity(table []liveTarget) (Verity, error) {
	mismatch := func(why string) (Verity, error) {
		return Verity{}, fmt.Errorf("%w: not the image of a root hash: %s", ErrTableMismatch, why)
	}
	if len(table) != 1 || table[0].kind != "verity" || table[0].start != 0 {
		return mismatch("not one target of dm-verity")
	}
	words := strings.Fields(table[0].params)
	if len(words) < 10 || words[0] != "1" || !slices.Contains([]string{"sha256", "sha512"}, words[7]) {
		return mismatch("not dm-verity of version 1 with SHA-256 or SHA-512")
	}
	size, sizeErr := strconv.ParseUint(words[3], 10, 32)
	blocks, blocksErr := strconv.ParseUint(words[5], 10, 48)
	if sizeErr != nil || blocksErr != nil || size < sectorSize || size > 1<<20 || blocks == 0 || blocks > 1<<50/size || blocks*size != table[0].length*sectorSize {
		return mismatch("its data blocks are not the whole mapping")
	}
	if !isHash(words[8], words[7]) {
		return mismatch("its root hash is malformed")
	}
	if len(words) > 10 {
		if count, err := strconv.Atoi(words[10]); err != nil || count != len(words)-11 {
			return mismatch("its options are malformed")
		}
		for rest := words[11:]; len(rest) > 0; {
			more, ok := verityOptions[rest[0]]
			if !ok || len(rest) < 1+more {
				return mismatch("its option " + strconv.Quote(rest[0]))
			}
			rest = rest[1+more:]
		}
	}
	return Verity{Bytes: int64(blocks * size), RootHash: words[8]}, nil
}

func isHash(text, kind string) bool {
	size := map[string]int{"sha256": 64, "sha512": 128}[kind]
	return len(text) == size && strings.Trim(text, "0123456789abcdef") == ""
}
