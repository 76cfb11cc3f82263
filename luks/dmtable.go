package luks

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DevNum is a device number as the kernel writes it.
type DevNum struct{ Major, Minor uint32 }

func (n DevNum) String() string { return fmt.Sprintf("%d:%d", n.Major, n.Minor) }

// The part of the device-mapper's ioctl interface (linux/dm-ioctl.h) that asks
// questions. libcryptsetup makes and removes mappings; what the kernel then has
// is read without it, so that the check does not share the maker's mistakes.
const (
	dmControl = "/dev/mapper/control"

	dmTableStatus = 0xc138fd0c

	dmReadOnly      = 1 << 0
	dmSuspended     = 1 << 1
	dmStatusTable   = 1 << 4
	dmActivePresent = 1 << 5
	dmBufferFull    = 1 << 8

	dmHeaderSize = 312 // sizeof(struct dm_ioctl)
	dmSpecSize   = 40  // sizeof(struct dm_target_spec)
	dmBufferSize = 16 << 10

	offDMSize    = 12
	offDMStart   = 16
	offDMTargets = 20
	offDMOpen    = 24
	offDMFlags   = 28
	offDMDev     = 40
	offDMName    = 48
	offDMUUID    = 176
	dmUUIDSize   = 129
)

// liveMapping is what the kernel says of a mapping.
type liveMapping struct {
	uuid     string
	dev      DevNum
	open     int32
	readOnly bool
	empty    bool // no table is in force; one may be loaded
	table    []liveTarget
}

type liveTarget struct {
	start, length uint64 // in sectors
	kind          string
	params        string
}

// inspect asks the kernel for a mapping, by name. It gives ErrNotActive if there
// is none.
func inspect(name string) (liveMapping, error) {
	buf, err := dmAsk(name)
	if err != nil {
		return liveMapping{}, err
	}
	return parseLive(buf)
}

func dmAsk(name string) ([]byte, error) {
	control, err := os.OpenFile(dmControl, os.O_RDWR, 0)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) {
		// A kernel without the device-mapper has no mapping of any name.
		return nil, fmt.Errorf("%w: %s: the kernel has no device-mapper: %w", ErrNotActive, name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("reach the device-mapper: %w", err)
	}
	defer control.Close()
	buf := make([]byte, dmBufferSize)
	ne := binary.NativeEndian
	ne.PutUint32(buf[0:], 4) // interface version 4.0.0
	ne.PutUint32(buf[offDMSize:], uint32(len(buf)))
	ne.PutUint32(buf[offDMStart:], dmHeaderSize)
	ne.PutUint32(buf[offDMFlags:], dmStatusTable)
	copy(buf[offDMName:offDMUUID-1], name)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), dmTableStatus, uintptr(unsafe.Pointer(&buf[0])))
	switch {
	case errors.Is(errno, unix.ENXIO):
		return nil, fmt.Errorf("%w: %s", ErrNotActive, name)
	case errno != 0:
		return nil, fmt.Errorf("ask the device-mapper for %s: %w", name, errno)
	}
	return buf, nil
}

// parseLive reads the kernel's answer. The kernel is trusted, but a slip here
// must not become a panic.
func parseLive(buf []byte) (liveMapping, error) {
	ne := binary.NativeEndian
	flags := ne.Uint32(buf[offDMFlags:])
	if flags&dmBufferFull != 0 {
		return liveMapping{}, fmt.Errorf("%w: it is longer than %d bytes", ErrTableMismatch, dmBufferSize)
	}
	dev := ne.Uint64(buf[offDMDev:])
	m := liveMapping{
		uuid:     cString(buf[offDMUUID : offDMUUID+dmUUIDSize]),
		dev:      DevNum{unix.Major(dev), unix.Minor(dev)},
		open:     int32(ne.Uint32(buf[offDMOpen:])),
		readOnly: flags&dmReadOnly != 0,
		empty:    flags&dmActivePresent == 0,
	}
	if flags&dmActivePresent == 0 || flags&dmSuspended != 0 {
		return m, nil // no table serves it
	}
	first := uint64(ne.Uint32(buf[offDMStart:]))
	at, least := first, first
	for range ne.Uint32(buf[offDMTargets:]) {
		if at < least || at+dmSpecSize > uint64(len(buf)) {
			return liveMapping{}, fmt.Errorf("%w: its targets are not one after the other", ErrTableMismatch)
		}
		spec := buf[at:]
		m.table = append(m.table, liveTarget{
			start:  ne.Uint64(spec),
			length: ne.Uint64(spec[8:]),
			kind:   cString(spec[24:dmSpecSize]),
			params: cString(spec[dmSpecSize:]),
		})
		// The offset of the next target counts from the first one.
		at, least = first+uint64(ne.Uint32(spec[20:])), at+dmSpecSize
	}
	return m, nil
}

func cString(p []byte) string {
	text, _, _ := bytes.Cut(p, []byte{0})
	return string(text)
}

// dmUUID is the UUID that libcryptsetup gives a mapping.
func dmUUID(uuid, name string) string {
	return "CRYPT-LUKS2-" + strings.ReplaceAll(uuid, "-", "") + "-" + name
}

// luksUUID is the inverse: the LUKS UUID of one of our mappings, or false.
func luksUUID(dm, name string) (string, bool) {
	rest, prefixed := strings.CutPrefix(dm, "CRYPT-LUKS2-")
	hex, named := strings.CutSuffix(rest, "-"+name)
	if !prefixed || !named || len(hex) != 32 {
		return "", false
	}
	uuid := hex[:8] + "-" + hex[8:12] + "-" + hex[12:16] + "-" + hex[16:20] + "-" + hex[20:]
	return uuid, uuidPattern.MatchString(uuid) && dmUUID(uuid, name) == dm
}

// The optional parameters that a table of ours may have. Each maps to what it
// means for the Mapping.
const (
	optSectorSize  = "sector_size:4096"
	optDiscards    = "allow_discards"
	optNoReadQueue = "no_read_workqueue"
	optNoWriteQ    = "no_write_workqueue"
)

// checkTable holds a live mapping against the one table that a volume of this
// package has, and returns what it maps. Anything that is not expected is a
// mismatch; there is no option that is let through unread.
func checkTable(m liveMapping, name, uuid string) (Mapping, error) {
	wrong := func(format string, args ...any) (Mapping, error) {
		return Mapping{}, fmt.Errorf("%w: %s: %s", ErrTableMismatch, name, fmt.Sprintf(format, args...))
	}
	if len(m.table) != 1 {
		return wrong("it has %d targets in force, expected is 1", len(m.table))
	}
	target := m.table[0]
	if target.kind != "crypt" || target.start != 0 {
		return wrong("target is %q at sector %d, expected is crypt at 0", target.kind, target.start)
	}
	fields := strings.Fields(target.params)
	if len(fields) < 5 {
		return wrong("it has %d fields", len(fields))
	}
	if fields[0] != cipherSpec {
		return wrong("cipher is %q, expected is %q", fields[0], cipherSpec)
	}
	// A key that is not a keyring reference would be the volume key itself: it
	// is compared, and never printed.
	if want := fmt.Sprintf(":%d:logon:cryptsetup:%s-d0", volumeKeySize, uuid); fields[1] != want {
		return wrong("key does not come from the kernel keyring as %q", want)
	}
	if fields[2] != "0" {
		return wrong("IV offset is %q, expected is 0", fields[2])
	}
	var dev DevNum
	if n, err := fmt.Sscanf(fields[3], "%d:%d", &dev.Major, &dev.Minor); n != 2 || err != nil || dev.String() != fields[3] {
		return wrong("data device is %q", fields[3])
	}
	if fields[4] != fmt.Sprint(dataOffset/sectorSize) {
		return wrong("data offset is %s sectors, expected is %d", fields[4], dataOffset/sectorSize)
	}
	var options []string
	if len(fields) > 5 {
		options = fields[6:]
		if fields[5] != fmt.Sprint(len(options)) {
			return wrong("it counts %s options and has %d", fields[5], len(options))
		}
	}
	for i, o := range options {
		if !slices.Contains([]string{optSectorSize, optDiscards, optNoReadQueue, optNoWriteQ}, o) || slices.Contains(options[:i], o) {
			return wrong("option %q is not expected", o)
		}
	}
	if !slices.Contains(options, optSectorSize) {
		return wrong("sector size is not %d", dataSectorSize)
	}
	return Mapping{
		Name:       name,
		Path:       "/dev/mapper/" + name,
		UUID:       uuid,
		Device:     m.dev,
		DataDevice: dev,
		Bytes:      int64(target.length) * sectorSize,
		ReadOnly:   m.readOnly,
		Discards:   slices.Contains(options, optDiscards),
		Workqueues: !slices.Contains(options, optNoReadQueue) && !slices.Contains(options, optNoWriteQ),
		InUse:      m.open > 0,
	}, nil
}
