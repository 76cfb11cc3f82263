package eventlog

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/google/go-eventlog/tcg"
)

func utf16z(s string) (out []byte) {
	for _, u := range utf16.Encode([]rune(s + "\x00")) {
		out = append(out, byte(u), byte(u>>8))
	}
	return out
}

func le32(n ...uint32) (out []byte) {
	for _, v := range n {
		out = binary.LittleEndian.AppendUint32(out, v)
	}
	return out
}

func le64(n ...uint64) (out []byte) {
	for _, v := range n {
		out = binary.LittleEndian.AppendUint64(out, v)
	}
	return out
}

func node(kind, sub byte, data ...byte) []byte {
	return append([]byte{kind, sub, byte(4 + len(data)), 0}, data...)
}

func variable(name string, value []byte) []byte {
	u := utf16z(name)
	u = u[:len(u)-2]
	return bytes.Join([][]byte{make([]byte, 16), le64(uint64(len(u)/2), uint64(len(value))), u, value}, nil)
}

func TestEventsReadAsAPersonWouldSayThem(t *testing.T) {
	file := bytes.Join([][]byte{node(2, 1, 0xd0, 0x41, 3, 10, 0, 0, 0, 0), node(1, 1, 1, 2), node(4, 4, utf16z(`\EFI\BOOT\BOOTX64.EFI`)...), node(0x7f, 0xff)}, nil)
	rom := bytes.Join([][]byte{node(4, 7, make([]byte, 16)...), node(4, 6, bytes.Repeat([]byte{0xab}, 16)...), node(0x7f, 0xff)}, nil)
	load := func(path []byte) []byte { return append(le64(0, 0, 0, uint64(len(path))), path...) }
	option := func(title string, path []byte) []byte {
		return bytes.Join([][]byte{le32(1), {byte(len(path)), 0}, utf16z(title), path}, nil)
	}
	list := func(kind string, size uint32, entries ...[]byte) []byte {
		var id []byte
		switch kind {
		case "sha256":
			id = []byte{0x26, 0x16, 0xc4, 0xc1, 0x4c, 0x50, 0x92, 0x40, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28}
		case "x509sha256":
			id = []byte{0x92, 0xa4, 0xd2, 0x3b, 0xc0, 0x96, 0x79, 0x40, 0xb4, 0x20, 0xfc, 0xf9, 0x8e, 0xf1, 0x03, 0xed}
		}
		body := bytes.Join(entries, nil)
		return bytes.Join([][]byte{id, le32(uint32(28+len(body)), 0, size), body}, nil)
	}
	revoked := make([]byte, 16+48)
	copy(revoked[16+32:], []byte{0xe9, 0x07, 5, 13}) // 2025-05-13
	dbx := append(list("sha256", 48, make([]byte, 48), make([]byte, 48)), list("x509sha256", 64, revoked)...)
	for _, c := range []struct {
		name         string
		in           tcg.Event
		want, detail string
	}{
		{"a part of a kernel image", tcg.Event{Type: tcg.Ipl, Data: utf16z(".cmdline")}, "kernel command line (.cmdline)", ""},
		{"a profile of one", tcg.Event{Type: tcg.Ipl, Data: utf16z(".profile")}, "profile (.profile)", ""},
		{"a boot loader's own words", tcg.Event{Type: tcg.Ipl, Data: utf16z("grub")}, "boot loader: grub", ""},
		{"shim's variable, of even length", tcg.Event{Type: tcg.Ipl, Data: []byte("MokList\x00")}, "shim's variable MokList", ""},
		{"a command of GRUB, of even length", tcg.Event{Type: tcg.Ipl, Data: []byte("grub_cmd: set x=1\x00")}, "GRUB command", "set x=1"},
		{"a command line by GRUB", tcg.Event{Type: tcg.Ipl, Data: []byte("kernel_cmdline: /vmlinuz root=/dev/x quiet\x00")}, "kernel command line, by GRUB", "/vmlinuz root=/dev/x quiet"},
		{"a file that GRUB reads", tcg.Event{Type: tcg.Ipl, Data: []byte("(hd0)/EFI/debian/grub.cfg\x00")}, "boot loader: (hd0)/EFI/debian/grub.cfg", ""},
		{"a command line by systemd-boot", tcg.Event{Type: tcg.Ipl, Data: utf16z("console=ttyS0 quiet")}, "kernel command line, by the loader", "console=ttyS0 quiet"},
		{"the kernel's tag", tcg.Event{Type: tcg.EventTag, Data: append(le32(0x8f3b22ed, 26), "LOADED_IMAGE::LoadOptions\x00"...)}, "command line, by the kernel", "LOADED_IMAGE::LoadOptions"},
		{"a tag of systemd", tcg.Event{Type: tcg.EventTag, Data: append(le32(0xd5cb7cbc, 26), utf16z("smbios:type1")...)}, "SMBIOS tables, by systemd", "smbios:type1"},
		{"a tag that nobody knows", tcg.Event{Type: tcg.EventTag, Data: append(le32(7, 3), 1, 2, 3)}, "tagged event 0x7", ""},
		{"a tag that is cut", tcg.Event{Type: tcg.EventTag, Data: le32(7, 3)}, "tagged event", ""},
		{"a program", tcg.Event{Type: tcg.EFIBootServicesApplication, Data: load(file)}, "EFI application", `PciRoot(0x0)/Pci(0x2,0x1)/\EFI\BOOT\BOOTX64.EFI`},
		{"a program that shim verified for GRUB", tcg.Event{Type: tcg.EFIBootServicesApplication, Data: load(nil)}, "EFI application", "from memory"},
		{"a driver in the firmware", tcg.Event{Type: tcg.EFIBootServicesDriver, Data: load(rom)}, "EFI driver", "Fv(00000000-0000-0000-0000-000000000000)/FvFile(ABABABAB-ABAB-ABAB-ABAB-ABABABABABAB)"},
		{"a driver in an option ROM", tcg.Event{Type: tcg.EFIBootServicesDriver, Data: load(append(file[:18:18], node(4, 8, append(make([]byte, 4), le64(0x10, 0x1f)...)...)...))}, "EFI driver", "PciRoot(0x0)/Pci(0x2,0x1)/Offset(0x10,0x1F)"},
		{"a boot entry", tcg.Event{Type: tcg.EFIVariableBoot, Data: variable("Boot0001", option("debian", file))}, "EFI variable Boot0001", `"debian" at PciRoot(0x0)/Pci(0x2,0x1)/\EFI\BOOT\BOOTX64.EFI`},
		{"the boot order", tcg.Event{Type: tcg.EFIVariableBoot, Data: variable("BootOrder", []byte{1, 0, 0x0a, 0})}, "EFI variable BootOrder", "0001, 000A"},
		{"revocations", tcg.Event{Type: tcg.EFIVariableDriverConfig, Data: variable("dbx", dbx)}, "Secure Boot dbx", "2 hashes, 1 revoked certificates, newest of 2025-05-13"},
		{"a database that is empty", tcg.Event{Type: tcg.EFIVariableDriverConfig, Data: variable("db", nil)}, "Secure Boot db", "empty"},
		{"shim's level", tcg.Event{Type: tcg.EFIVariableAuthority, Data: variable("SbatLevel", []byte("sbat,1,2021030218\n"))}, "shim's revocation level (SbatLevel)", "sbat,1,2021030218·"},
		{"a part of firmware", tcg.Event{Type: tcg.EFIPlatformFirmwareBlob, Data: le64(0x820000, 0xe0000)}, "firmware", "917504 bytes at 0x820000"},
		{"a part with a name", tcg.Event{Type: tcg.EFIPlatformFirmwareBlob2, Data: append([]byte("\x04PEI\x00"), le64(0x10, 0x20)...)}, "firmware PEI", "32 bytes at 0x10"},
		{"a separator", tcg.Event{Type: tcg.Separator, Data: make([]byte, 4)}, "separator", ""},
		{"a separator of an error", tcg.Event{Type: tcg.Separator, Data: []byte{1, 0, 0, 0}}, "separator of an error", "firmware gave up measuring here"},
		{"Google's word", tcg.Event{Type: tcg.NonhostInfo, Data: []byte("GCE NonHostInfo\x00\x04\x00")}, "confidential technology", "AMD SEV-SNP"},
		{"flags", tcg.Event{Type: tcg.PlatformConfigFlags, Data: []byte("a=1")}, "platform_config_flags", "a=1"},
		{"control characters", tcg.Event{Type: tcg.EFIAction, Data: []byte("a\x1b[2Jb")}, "a·[2Jb", ""},
		{"a variable that cannot be read", tcg.Event{Type: tcg.EFIVariableBoot2, Data: []byte{1}}, "EFI variable", ""},
		{"a type that nobody knows", tcg.Event{Type: 0x1234}, "0x1234", ""},
		{"endless data", tcg.Event{Type: tcg.EFIAction, Data: []byte(strings.Repeat("x", 9000))}, strings.Repeat("x", maxDetail) + "…", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			sum := sha256.Sum256(c.in.Data)
			c.in.Digest = sum[:]
			if got := Describe(1, c.in); got.Name != c.want || got.Detail != c.detail || got.Seq != 1 {
				t.Errorf("%+v, want %q, %q", got, c.want, c.detail)
			}
		})
	}
}

// Dell's firmware writes another version than it measures.
func TestTextThatWasNotMeasuredIsNotShown(t *testing.T) {
	e := tcg.Event{Type: tcg.SCRTMVersion, Data: utf16z("2.5.1"), Digest: make([]byte, 32)}
	if got := Describe(1, e); got.Name != "firmware version" || strings.Contains(got.Detail, "2.5.1") {
		t.Errorf("%+v", got)
	}
}
