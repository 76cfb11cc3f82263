// Package probe asks libblkid what an open device holds.
//
// libblkid knows some eighty filesystems, RAID members, swap areas, encrypted
// containers and partition tables. This package has it look for all of them, also
// for those whose checksum does not hold, and returns each that it finds. It reads
// through the descriptor that it is given and opens nothing itself.
package probe

/*
#cgo pkg-config: blkid
#include <errno.h>
#include <stdlib.h>
#include <blkid.h>

// Looks for everything: superblocks of every kind, good or with a bad checksum, and
// partition tables.
static int ka_prepare(blkid_probe pr, int fd)
{
	if (blkid_probe_set_device(pr, fd, 0, 0))
		return -1;
	if (blkid_probe_enable_superblocks(pr, 1) ||
	    blkid_probe_set_superblocks_flags(pr, BLKID_SUBLKS_TYPE | BLKID_SUBLKS_USAGE |
		BLKID_SUBLKS_UUID | BLKID_SUBLKS_LABEL | BLKID_SUBLKS_MAGIC | BLKID_SUBLKS_BADCSUM))
		return -1;
	if (blkid_probe_enable_partitions(pr, 1) ||
	    blkid_probe_set_partitions_flags(pr, BLKID_PARTS_MAGIC | BLKID_PARTS_FORCE_GPT))
		return -1;
	return 0;
}

// One more signature: 0 found, 1 no more, negative an error.
static int ka_next(blkid_probe pr)
{
	int r;

	errno = 0;
	r = blkid_do_probe(pr);
	if (r < 0)
		return errno ? -errno : -EIO;
	if (r > 0 && (errno == EIO || errno == ENODEV || errno == ENXIO))
		return -errno;
	return r;
}

static const char *ka_value(blkid_probe pr, const char *name, size_t *len)
{
	const char *data;

	*len = 0;
	if (blkid_probe_lookup_value(pr, name, &data, len))
		return NULL;
	return data;
}
*/
import "C"

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

// ErrFailed means that libblkid could not look at the device. It never means that
// there is nothing on it.
var ErrFailed = errors.New("libblkid cannot look at the device")

// Found is one thing that is on a device.
type Found struct {
	Type   string // blkid's word for it, such as "ext4" or "gpt"
	Usage  string // "filesystem", "raid", "crypto", "other" or "partition table"
	Offset int64  // of its magic, in bytes
	UUID   string
	Label  string
}

// most is how many signatures one device may have.
const most = 64

// Device returns what libblkid finds on the device behind fd. It moves the file
// offset of fd.
func Device(fd int) ([]Found, error) {
	pr := C.blkid_new_probe()
	if pr == nil {
		return nil, fmt.Errorf("%w: no memory", ErrFailed)
	}
	defer C.blkid_free_probe(pr)
	if C.ka_prepare(pr, C.int(fd)) != 0 {
		return nil, ErrFailed
	}
	if C.blkid_probe_get_size(pr) <= 0 {
		return nil, fmt.Errorf("%w: it has no size", ErrFailed)
	}
	var all []Found
	for len(all) < most {
		switch r := C.ka_next(pr); {
		case r < 0:
			return nil, fmt.Errorf("%w: %w", ErrFailed, syscall.Errno(-r))
		case r > 0:
			return all, nil
		}
		all = append(all, found(pr))
	}
	return all, nil
}

func found(pr C.blkid_probe) Found {
	f := Found{
		Type: value(pr, "TYPE"), Usage: value(pr, "USAGE"),
		UUID: value(pr, "UUID"), Label: value(pr, "LABEL"),
	}
	offset := value(pr, "SBMAGIC_OFFSET")
	if f.Type == "" {
		f.Type, f.Usage = value(pr, "PTTYPE"), "partition table"
		f.UUID, offset = value(pr, "PTUUID"), value(pr, "PTMAGIC_OFFSET")
	}
	f.Offset, _ = strconv.ParseInt(offset, 10, 64) // some have no magic: then it is 0
	return f
}

// value returns what libblkid says, shortened and printable: it comes from the
// device.
func value(pr C.blkid_probe, name string) string {
	cName := C.CString(name)
	defer C.free(unsafe.Pointer(cName))
	var n C.size_t
	data := C.ka_value(pr, cName, &n)
	if data == nil || n == 0 {
		return ""
	}
	text, _, _ := strings.Cut(C.GoStringN(data, C.int(min(n, 256))), "\x00")
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
}
