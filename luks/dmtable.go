package luks

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// DevNum is a device number as the kernel writes it.
type DevNum struct{ Major, Minor uint32 }

func (n DevNum) String() string { return fmt.Sprintf("%d:%d", n.Major, n.Minor) }

// liveMapping is what the kernel says of a mapping.
type liveMapping struct {
	uuid      string
	dev       DevNum
	open      int32
	readOnly  bool
	suspended bool
	empty     bool // no table is in force; one may be loaded
	table     []liveTarget
	tags      *liveMapping // the lower mapping, of one that verifies tags
}

type liveTarget struct {
	start, length uint64 // in sectors
	kind          string
	params        string
}

// inspect asks the kernel for a mapping, by name. It gives ErrNotActive if there
// is none. What the kernel has is read back by code that shares nothing with what
// made it but the layout of the call.
func inspect(name string) (liveMapping, error) {
	buf, err := dmCall{command: dmTableStatus, name: name, flags: dmStatusTable}.run()
	switch {
	case errors.Is(err, unix.ENXIO):
		return liveMapping{}, fmt.Errorf("%w: %s", ErrNotActive, name)
	case err != nil:
		return liveMapping{}, fmt.Errorf("ask the device-mapper for %s: %w", name, err)
	}
	m, err := parseLive(buf)
	if err != nil || !m.verifiesTags() {
		return m, err
	}
	lower, err := inspect(tagsName(name))
	if err != nil {
		return liveMapping{}, err
	}
	m.tags = &lower
	return m, nil
}

// verifiesTags says whether a mapping is that of an authenticated volume, or pretends
// to be.
func (m liveMapping) verifiesTags() bool {
	return strings.HasPrefix(m.uuid, dmPrefix) && len(m.table) == 1 && m.table[0].kind == cryptKind && taggedForm(m.table[0].params) != nil
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
		uuid:      cString(buf[offDMUUID : offDMUUID+dmUUIDSize]),
		dev:       DevNum{unix.Major(dev), unix.Minor(dev)},
		open:      int32(ne.Uint32(buf[offDMOpen:])),
		readOnly:  flags&dmReadOnly != 0,
		empty:     flags&dmActivePresent == 0,
		suspended: flags&dmSuspended != 0,
	}
	if m.empty {
		return m, nil
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

const dmPrefix = "CRYPT-LUKS2-"

// dmUUID is the UUID that libcryptsetup gives a mapping.
func dmUUID(uuid, name string) string {
	return dmPrefix + strings.ReplaceAll(uuid, "-", "") + "-" + name
}

// luksUUID is the inverse: the LUKS UUID of one of our mappings, or false.
func luksUUID(dm, name string) (string, bool) {
	rest, prefixed := strings.CutPrefix(dm, dmPrefix)
	hex, named := strings.CutSuffix(rest, "-"+name)
	if !prefixed || !named || len(hex) != 32 {
		return "", false
	}
	uuid := hex[:8] + "-" + hex[8:12] + "-" + hex[12:16] + "-" + hex[16:20] + "-" + hex[20:]
	return uuid, uuidPattern.MatchString(uuid) && dmUUID(uuid, name) == dm
}
