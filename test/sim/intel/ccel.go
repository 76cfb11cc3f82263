package intel

import (
	"crypto/sha512"
	"encoding/binary"
	"unicode/utf16"
)

// Event of a confidential-computing event log.
type Event struct {
	Register uint32 // 1 is RTMR0, as firmware counts
	Type     uint32
	Data     []byte
	// Digest defaults to the SHA-384 of Data.
	Digest []byte
}

// Types of events, as the PC Client Platform Firmware Profile numbers them.
const (
	EventSeparator = 0x4
	EventIPL       = 0xd
	EventVariable  = 0x80000001 // EV_EFI_VARIABLE_DRIVER_CONFIG
	EventAction    = 0x80000007
)

// DefaultEvents is a short boot: Secure Boot on, a kernel and its command line.
func DefaultEvents() []Event {
	return []Event{
		{Register: 1, Type: EventVariable, Data: variable("SecureBoot", 1)},
		{Register: 1, Type: EventSeparator, Data: make([]byte, 4)},
		{Register: 2, Type: EventAction, Data: []byte("Exit Boot Services Invocation")},
		{Register: 2, Type: EventSeparator, Data: make([]byte, 4)},
		{Register: 3, Type: EventIPL, Data: text(".linux"), Digest: digest("kernel")},
		{Register: 3, Type: EventIPL, Data: text(".cmdline"), Digest: digest("console=ttyS0")},
	}
}

// EventLog encodes events as firmware does, and replays them.
func EventLog(events []Event) (log []byte, rtmr [4][48]byte) {
	u16, u32 := binary.LittleEndian.AppendUint16, binary.LittleEndian.AppendUint32
	// The first event names the format and its one algorithm, SHA-384.
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2)
	spec = u16(u16(u32(spec, 1), 0x0c), 48)
	spec = append(spec, 0)
	log = u32(u32(nil, 1), 3)
	log = append(log, make([]byte, 20)...)
	log = append(u32(log, uint32(len(spec))), spec...)
	for _, e := range events {
		if e.Digest == nil {
			sum := sha512.Sum384(e.Data)
			e.Digest = sum[:]
		}
		log = u16(u32(u32(u32(log, e.Register), e.Type), 1), 0x0c)
		log = append(log, e.Digest...)
		log = append(u32(log, uint32(len(e.Data))), e.Data...)
		if e.Register >= 1 && e.Register <= 4 {
			r := &rtmr[e.Register-1]
			*r = sha512.Sum384(append(r[:], e.Digest...))
		}
	}
	return log, rtmr
}

func digest(s string) []byte {
	sum := sha512.Sum384([]byte(s))
	return sum[:]
}

func text(s string) []byte {
	var out []byte
	for _, u := range utf16.Encode([]rune(s + "\x00")) {
		out = binary.LittleEndian.AppendUint16(out, u)
	}
	return out
}

// variable is a UEFI_VARIABLE_DATA.
func variable(name string, value byte) []byte {
	out := make([]byte, 16) // the vendor's GUID
	out = binary.LittleEndian.AppendUint64(out, uint64(len(name)))
	out = binary.LittleEndian.AppendUint64(out, 1)
	out = append(out, text(name)[:2*len(name)]...)
	return append(out, value)
}
