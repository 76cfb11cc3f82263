// Package eventlog says what the entries of a measured-boot log mean, for every
// kind of evidence that carries one: the TPM's log and the CCEL of a TD have the
// same events (TCG PC Client Platform Firmware Profile) over other registers.
//
// Nothing here proves anything. A package of evidence replays a log to values
// that hardware signed, and then shows its events in these words.
package eventlog

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf16"

	"github.com/google/go-eventlog/tcg"

	"github.com/keyagent/keyagent/attestation"
)

// maxDetail bounds what of an event's data is shown to people.
const maxDetail = 256

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
	".pcrpkey": "PCR signing key", ".ucode": "microcode",
}

// Describe puts an event into a person's words. It never fails: what cannot be
// read is shown by its type alone.
func Describe(seq int, e tcg.Event) attestation.Event {
	out := attestation.Event{Seq: seq, Type: typeNames[e.Type], Digest: hex.EncodeToString(e.Digest)}
	if out.Type == "" {
		out.Type = fmt.Sprintf("%#x", uint32(e.Type))
	}
	switch e.Type {
	case tcg.EFIBootServicesApplication, tcg.EFIBootServicesDriver, tcg.EFIRuntimeServicesDriver:
		out.Name = "EFI application"
		if load, err := tcg.ParseEFIImageLoad(bytes.NewReader(e.Data)); err == nil {
			out.Detail = devicePath(load)
		}
	case tcg.EFIVariableDriverConfig, tcg.EFIVariableBoot, tcg.EFIVariableBoot2, tcg.EFIVariableAuthority:
		out.Name = "EFI variable"
		if v, err := tcg.ParseUEFIVariableData(bytes.NewReader(e.Data)); err == nil {
			name := string(utf16.Decode(v.UnicodeName))
			out.Name = variableName(printable(name))
			out.Detail = fmt.Sprintf("%d bytes", len(v.VariableData))
			if len(v.VariableData) == 1 {
				out.Detail = fmt.Sprintf("value %d", v.VariableData[0])
			}
		}
	case tcg.Ipl:
		text := utf16Text(e.Data)
		out.Name = "boot loader: " + text
		if s, ok := sectionNames[text]; ok {
			out.Name = s + " (" + text + ")"
		}
	case tcg.EFIAction, tcg.Action, tcg.OmitBootDeviceEvents:
		out.Name = printable(string(e.Data))
	case tcg.PostCode, tcg.SCRTMContents, tcg.EFIPlatformFirmwareBlob, tcg.EFIPlatformFirmwareBlob2:
		out.Name = "firmware"
		out.Detail = printable(string(e.Data))
	case tcg.SCRTMVersion:
		out.Name = "firmware version"
		out.Detail = utf16Text(e.Data)
	case tcg.EFIGPTEvent:
		out.Name = "partition table"
	case tcg.EFIHandoffTables, tcg.EFIHandoffTables2, tcg.TableOfDevices:
		out.Name = "firmware tables"
	case tcg.Separator:
		out.Name = "separator"
	default:
		out.Name = strings.ToLower(strings.TrimPrefix(out.Type, "EV_"))
	}
	return out
}

func variableName(name string) string {
	switch name {
	case "SecureBoot":
		return "Secure Boot state (SecureBoot)"
	case "PK", "KEK", "db", "dbx", "dbr", "dbt":
		return "Secure Boot " + name
	case "":
		return "EFI variable"
	}
	return "EFI variable " + name
}

// devicePath shows the file path of an image that came from a disk.
func devicePath(load tcg.EFIImageLoad) string {
	path, err := load.DevicePath()
	if err != nil {
		return ""
	}
	for _, el := range path {
		if el.Type == tcg.MediaDevice && el.Subtype == 4 { // file path, UEFI 2.10 section 10.3.5.4
			return utf16Text(el.Data)
		}
	}
	return "from memory"
}

func utf16Text(b []byte) string {
	if len(b)%2 != 0 {
		return printable(string(b))
	}
	u := make([]uint16, 0, len(b)/2)
	for i := 0; i+1 < len(b); i += 2 {
		u = append(u, uint16(b[i])|uint16(b[i+1])<<8)
	}
	return printable(string(utf16.Decode(u)))
}

// printable keeps control characters and endless data out of terminals and
// logs.
func printable(s string) string {
	s = strings.TrimRight(s, "\x00")
	var out strings.Builder
	for _, r := range s {
		if out.Len() >= maxDetail {
			out.WriteString("…")
			break
		}
		if !unicode.IsPrint(r) {
			r = '·'
		}
		out.WriteRune(r)
	}
	return out.String()
}

// DigestIsOfData lists the types whose digest is that of the logged data, by
// the PC Client Platform Firmware Profile table 27. Of other types the data is
// a description and proves nothing.
func DigestIsOfData(t tcg.EventType) bool {
	switch t {
	case tcg.Separator, tcg.EFIAction, tcg.EFIVariableDriverConfig, tcg.EFIGPTEvent,
		tcg.EFIVariableBoot2, tcg.SCRTMVersion:
		return true
	}
	return false
}
