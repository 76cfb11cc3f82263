package eventlog

import (
	"encoding/hex"
	"fmt"
	"strings"
)

// guid formats the mixed-endian bytes of an EFI GUID.
func guid(b []byte) string {
	if len(b) != 16 {
		return hex.EncodeToString(b)
	}
	return fmt.Sprintf("%02X%02X%02X%02X-%02X%02X-%02X%02X-%X-%X", b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6], b[8:10], b[10:])
}

// maxNodes bounds the nodes of a device path that are shown.
const maxNodes = 24

// devicePath shows a device path in the form that UEFI 2.10, section 10.6, gives
// it, as far as boots have it. Other nodes are shown by their numbers.
func devicePath(path []byte) string {
	c := &cursor{rest: path}
	var out []string
	for len(c.rest) > 0 && len(out) < maxNodes {
		head := c.take(2)
		size := int(c.u16())
		if c.short || size < 4 {
			break
		}
		data := c.take(size - 4)
		if c.short || head[0] == 0x7f {
			break
		}
		out = append(out, deviceNode(head[0], head[1], data))
	}
	return printable(strings.Join(out, "/"))
}

func deviceNode(kind, sub byte, data []byte) string {
	c := &cursor{rest: data}
	s := fmt.Sprintf("Path(%d,%d)", kind, sub)
	switch [2]byte{kind, sub} {
	case [2]byte{1, 1}:
		if b := c.take(2); b != nil {
			s = fmt.Sprintf("Pci(0x%X,0x%X)", b[1], b[0])
		}
	case [2]byte{1, 3}:
		s = fmt.Sprintf("MemoryMapped(0x%X,0x%X,0x%X)", c.u32(), c.u64(), c.u64())
	case [2]byte{1, 4}:
		s = "VenHw(" + guid(c.take(16)) + ")"
	case [2]byte{2, 1}:
		s = acpiNode(c.u32(), c.u32())
	case [2]byte{3, 1}:
		if b := c.take(2); b != nil {
			s = fmt.Sprintf("Ata(%d,%d)", b[0], b[1])
		}
	case [2]byte{3, 2}:
		s = fmt.Sprintf("Scsi(0x%X,0x%X)", c.u16(), c.u16())
	case [2]byte{3, 5}:
		if b := c.take(2); b != nil {
			s = fmt.Sprintf("USB(0x%X,0x%X)", b[0], b[1])
		}
	case [2]byte{3, 10}:
		s = "VenMsg(" + guid(c.take(16)) + ")"
	case [2]byte{3, 11}:
		if b := c.take(32); b != nil {
			s = "MAC(" + hex.EncodeToString(b[:6]) + ")"
		}
	case [2]byte{3, 18}:
		s = fmt.Sprintf("Sata(0x%X,0x%X,0x%X)", c.u16(), c.u16(), c.u16())
	case [2]byte{3, 23}:
		s = fmt.Sprintf("NVMe(0x%X)", c.u32())
	case [2]byte{3, 24}:
		s = "Uri(" + string(c.rest) + ")"
	case [2]byte{4, 1}:
		n := c.u32()
		c.take(16)
		if id := c.take(16); id != nil {
			s = fmt.Sprintf("HD(%d,%s)", n, guid(id))
		}
	case [2]byte{4, 2}:
		s = fmt.Sprintf("CDROM(0x%X)", c.u32())
	case [2]byte{4, 3}:
		s = "VenMedia(" + guid(c.take(16)) + ")"
	case [2]byte{4, 4}:
		s = text(c.rest)
	case [2]byte{4, 6}:
		s = "FvFile(" + guid(c.take(16)) + ")"
	case [2]byte{4, 7}:
		s = "Fv(" + guid(c.take(16)) + ")"
	case [2]byte{4, 8}:
		c.take(4)
		s = fmt.Sprintf("Offset(0x%X,0x%X)", c.u64(), c.u64())
	}
	if c.short {
		return fmt.Sprintf("Path(%d,%d)", kind, sub)
	}
	return strings.TrimRight(s, "\x00")
}

func acpiNode(hid, uid uint32) string {
	// An EISA identifier: PNP in the low half, the number in the high one.
	const pnp = 0x41d0
	switch {
	case hid&0xffff != pnp:
		return fmt.Sprintf("Acpi(0x%X,0x%X)", hid, uid)
	case hid>>16 == 0x0a03:
		return fmt.Sprintf("PciRoot(0x%X)", uid)
	case hid>>16 == 0x0a08:
		return fmt.Sprintf("PcieRoot(0x%X)", uid)
	}
	return fmt.Sprintf("Acpi(PNP%04X,0x%X)", hid>>16, uid)
}
