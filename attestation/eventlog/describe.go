// Package eventlog reads measured-boot logs and says what their entries mean, for
// every kind of evidence that carries one: the TPM's log and the CCEL of a TD have
// the same events (TCG PC Client Platform Firmware Profile) over other registers.
//
// Nothing here proves anything. A package of evidence replays a log to values
// that hardware signed, and then shows its events in these words.
package eventlog

import (
	"bytes"
	"crypto"
	_ "crypto/sha256" // of TPMs
	_ "crypto/sha512" // of TDs
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-eventlog/tcg"

	"github.com/keyagent/keyagent/attestation"
)

// typeNames are the TCG's own names.
var typeNames = map[tcg.EventType]string{
	tcg.PrebootCert: "EV_PREBOOT_CERT", tcg.PostCode: "EV_POST_CODE", tcg.NoAction: "EV_NO_ACTION",
	tcg.Separator: "EV_SEPARATOR", tcg.Action: "EV_ACTION", tcg.EventTag: "EV_EVENT_TAG",
	tcg.SCRTMContents: "EV_S_CRTM_CONTENTS", tcg.SCRTMVersion: "EV_S_CRTM_VERSION",
	tcg.CPUMicrocode: "EV_CPU_MICROCODE", tcg.PlatformConfigFlags: "EV_PLATFORM_CONFIG_FLAGS",
	tcg.TableOfDevices: "EV_TABLE_OF_DEVICES", tcg.CompactHash: "EV_COMPACT_HASH", tcg.Ipl: "EV_IPL",
	tcg.IplPartitionData: "EV_IPL_PARTITION_DATA", tcg.NonhostCode: "EV_NONHOST_CODE",
	tcg.NonhostConfig: "EV_NONHOST_CONFIG", tcg.NonhostInfo: "EV_NONHOST_INFO",
	tcg.OmitBootDeviceEvents:    "EV_OMIT_BOOT_DEVICE_EVENTS",
	tcg.EFIVariableDriverConfig: "EV_EFI_VARIABLE_DRIVER_CONFIG", tcg.EFIVariableBoot: "EV_EFI_VARIABLE_BOOT",
	tcg.EFIBootServicesApplication: "EV_EFI_BOOT_SERVICES_APPLICATION",
	tcg.EFIBootServicesDriver:      "EV_EFI_BOOT_SERVICES_DRIVER",
	tcg.EFIRuntimeServicesDriver:   "EV_EFI_RUNTIME_SERVICES_DRIVER",
	tcg.EFIGPTEvent:                "EV_EFI_GPT_EVENT", tcg.EFIAction: "EV_EFI_ACTION",
	tcg.EFIPlatformFirmwareBlob:  "EV_EFI_PLATFORM_FIRMWARE_BLOB",
	tcg.EFIHandoffTables:         "EV_EFI_HANDOFF_TABLES",
	tcg.EFIPlatformFirmwareBlob2: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
	tcg.EFIHandoffTables2:        "EV_EFI_HANDOFF_TABLES2", tcg.EFIVariableBoot2: "EV_EFI_VARIABLE_BOOT2",
	tcg.EFIHCRTMEvent: "EV_EFI_HCRTM_EVENT", tcg.EFIVariableAuthority: "EV_EFI_VARIABLE_AUTHORITY",
}

// sectionNames say what a person calls the parts of a unified kernel image.
var sectionNames = map[string]string{
	".linux": "kernel", ".osrel": "os-release", ".cmdline": "kernel command line", ".initrd": "initrd",
	".splash": "splash image", ".dtb": "device tree", ".uname": "kernel version", ".sbat": "SBAT data",
	".pcrpkey": "PCR signing key", ".ucode": "microcode", ".profile": "profile",
	".dtbauto": "chosen device tree", ".hwids": "hardware identifiers", ".efifw": "firmware image",
}

// SectionName says what a person calls a part of a unified kernel image.
func SectionName(section string) string {
	if s, ok := sectionNames[section]; ok {
		return s + " (" + section + ")"
	}
	return section
}

// Describe puts an event into a person's words. It never fails: what cannot be
// read is shown by its type alone.
func Describe(seq int, e tcg.Event) attestation.Event {
	out := attestation.Event{Seq: seq, Type: typeNames[e.Type], Digest: hex.EncodeToString(e.Digest)}
	if out.Type == "" {
		out.Type = fmt.Sprintf("%#x", uint32(e.Type))
	}
	describe := describers[e.Type]
	if describe == nil {
		describe = describeAny
	}
	if DigestIsOfData(e.Type) && !describes(e) {
		// A firmware that writes other data than it measured: what it wrote says
		// nothing of what was measured.
		e.Data = nil
		out.Name, _ = describe(e)
		out.Detail = "the log's text is not what was measured"
	} else {
		out.Name, out.Detail = describe(e)
	}
	if out.Name == "" {
		out.Name = strings.ToLower(strings.TrimPrefix(out.Type, "EV_"))
	}
	return out
}

// describes reports whether an event's digest is that of its data.
func describes(e tcg.Event) bool {
	var hash crypto.Hash
	switch len(e.Digest) {
	case crypto.SHA256.Size():
		hash = crypto.SHA256
	case crypto.SHA384.Size():
		hash = crypto.SHA384
	default:
		return false
	}
	h := hash.New()
	h.Write(e.Data)
	return bytes.Equal(h.Sum(nil), e.Digest)
}

// describers return a name and a detail for each type of event. An empty name
// stands for the type's own.
var describers = map[tcg.EventType]func(tcg.Event) (name, detail string){
	tcg.EFIBootServicesApplication: func(e tcg.Event) (string, string) { return "EFI application", imagePath(e.Data) },
	tcg.EFIBootServicesDriver:      func(e tcg.Event) (string, string) { return "EFI driver", imagePath(e.Data) },
	tcg.EFIRuntimeServicesDriver:   func(e tcg.Event) (string, string) { return "EFI driver", imagePath(e.Data) },
	tcg.EFIVariableDriverConfig:    ofVariable, tcg.EFIVariableBoot: ofVariable,
	tcg.EFIVariableBoot2: ofVariable, tcg.EFIVariableAuthority: ofVariable,
	tcg.Ipl:       describeIPL,
	tcg.EventTag:  describeTag,
	tcg.EFIAction: ofText, tcg.Action: ofText, tcg.OmitBootDeviceEvents: ofText,
	tcg.PostCode: ofFirmware, tcg.SCRTMContents: ofFirmware,
	tcg.EFIPlatformFirmwareBlob: ofFirmware, tcg.EFIPlatformFirmwareBlob2: ofFirmware,
	tcg.SCRTMVersion:     func(e tcg.Event) (string, string) { return "firmware version", readable(e.Data) },
	tcg.EFIGPTEvent:      func(tcg.Event) (string, string) { return "partition table", "" },
	tcg.EFIHandoffTables: ofTables, tcg.EFIHandoffTables2: ofTables, tcg.TableOfDevices: ofTables,
	tcg.Separator:   describeSeparator,
	tcg.NonhostInfo: describeNonHost,
}

func describeAny(e tcg.Event) (string, string) { return "", readable(e.Data) }

func ofVariable(e tcg.Event) (string, string) { return describeVariable(e.Type, e.Data) }

func ofText(e tcg.Event) (string, string) { return printable(text(e.Data)), "" }

// ofFirmware shows a text, or the place of a part of firmware: base and length,
// after a name of its own in events of the second form.
func ofFirmware(e tcg.Event) (string, string) {
	c := &cursor{rest: e.Data}
	name := "firmware"
	if e.Type == tcg.EFIPlatformFirmwareBlob2 {
		if n := c.take(1); n != nil {
			if label := c.take(int(n[0])); isText(label) {
				name += " " + printable(text(label))
			}
		}
	}
	if len(c.rest) == 16 && !isText(c.rest) {
		return name, fmt.Sprintf("%[2]d bytes at %#[1]x", c.u64(), c.u64())
	}
	return name, readable(c.rest)
}

func ofTables(e tcg.Event) (string, string) {
	if e.Type == tcg.EFIHandoffTables2 && len(e.Data) > 1 && int(e.Data[0]) < len(e.Data) {
		return "firmware tables", readable(e.Data[1 : 1+e.Data[0]])
	}
	return "firmware tables", ""
}

// readable shows data that is text.
func readable(data []byte) string {
	if isText(data) {
		return printable(text(data))
	}
	return ""
}

// imagePath shows where a program came from, by its device path.
func imagePath(data []byte) string {
	c := &cursor{rest: data}
	c.take(8 + 8 + 8) // place and length in memory, linked address
	size := c.u64()
	if c.short || size > uint64(len(c.rest)) {
		return ""
	}
	if path := devicePath(c.take(int(size))); path != "" {
		return path
	}
	return "from memory"
}

// describeSeparator tells the end of firmware's measurements from its failure: the
// value is 0 or 0xffffffff where all is well (section 3.3.2.2 item 7).
func describeSeparator(e tcg.Event) (string, string) {
	if len(e.Data) == 4 && !bytes.Equal(e.Data, []byte{0, 0, 0, 0}) && !bytes.Equal(e.Data, []byte{0xff, 0xff, 0xff, 0xff}) {
		return "separator of an error", "firmware gave up measuring here"
	}
	return "separator", ""
}

// describeIPL shows what boot loaders and stubs measure: the sections of a unified
// kernel image, GRUB's commands, shim's variables.
func describeIPL(e tcg.Event) (string, string) {
	raw := strings.TrimRight(text(e.Data), "\x00")
	if _, ok := sectionNames[raw]; ok {
		return SectionName(raw), ""
	}
	for prefix, name := range map[string]string{
		"kernel_cmdline: ": "kernel command line, by GRUB", "grub_kernel_cmdline ": "kernel command line, by GRUB",
		"module_cmdline: ": "module command line, by GRUB", "grub_cmd: ": "GRUB command", "grub_cmd ": "GRUB command",
	} {
		if rest, ok := strings.CutPrefix(raw, prefix); ok {
			return name, bounded(rest, maxText)
		}
	}
	switch {
	case slices.Contains([]string{"MokList", "MokListX", "MokListTrusted", "MokSBState", "SbatLevel"}, raw):
		return "shim's variable " + raw, ""
	case strings.Contains(raw, "="):
		// systemd-boot and its stub measure the command line by itself.
		return "kernel command line, by the loader", bounded(raw, maxText)
	}
	return "boot loader: " + printable(raw), ""
}

// tags are the identifiers of EV_EVENT_TAG that Linux and systemd use.
var tags = map[uint32]string{
	0x8f3b22ec: "initrd, by the kernel", 0x8f3b22ed: "command line, by the kernel",
	0xf5bc582a: "loader configuration, by systemd-boot", 0x6c46f751: "device tree of an add-on, by the stub",
	0x49dffe0f: "initrd of an add-on, by the stub", 0xdac08e1a: "microcode of an add-on, by the stub",
	0x13aed6db: "profile, by the stub", 0xd5cb7cbc: "SMBIOS tables, by systemd",
}

func describeTag(e tcg.Event) (string, string) {
	c := &cursor{rest: e.Data}
	id := c.u32()
	data := c.data()
	if c.short {
		return "tagged event", readable(e.Data)
	}
	name, ok := tags[id]
	if !ok {
		name = fmt.Sprintf("tagged event %#x", id)
	}
	return name, readable(data)
}

// technologies of confidential machines, as Google's firmware numbers them
// (google/go-eventlog, proto/state.proto).
var technologies = []string{"none", "AMD SEV", "AMD SEV-ES", "Intel TDX", "AMD SEV-SNP"}

func describeNonHost(e tcg.Event) (string, string) {
	if rest, ok := bytes.CutPrefix(e.Data, []byte("GCE NonHostInfo\x00")); ok && len(rest) > 0 && int(rest[0]) < len(technologies) {
		return "confidential technology", technologies[rest[0]]
	}
	return "", readable(e.Data)
}

// DigestIsOfData lists the types whose digest is that of the logged data, by
// the PC Client Platform Firmware Profile table 27. Of other types the data is
// a description and proves nothing. Firmware breaks that rule: an event whose
// digest is another counts as it extended the register, and its data is not shown.
func DigestIsOfData(t tcg.EventType) bool {
	switch t {
	case tcg.Separator, tcg.EFIAction, tcg.EFIVariableDriverConfig, tcg.EFIGPTEvent,
		tcg.EFIVariableBoot2, tcg.SCRTMVersion:
		return true
	}
	return false
}
