package measure

import (
	"encoding/binary"
	"os"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/attestation/tpm/uki"
)

// systemdBoot is a program that says that it is systemd-boot, with constants.
func systemdBoot(t *testing.T, constants string) *uki.Loader {
	t.Helper()
	var text []byte
	for _, u := range utf16.Encode([]rune(constants + "\x00")) {
		text = binary.LittleEndian.AppendUint16(text, u)
	}
	const headers = 1024
	b := make([]byte, headers)
	copy(b, "MZ")
	b[0x3c] = 64
	copy(b[64:], "PE\x00\x00\x64\x86\x02")
	le := binary.LittleEndian
	le.PutUint16(b[84:], 240) // of the optional header
	le.PutUint16(b[88:], 0x20b)
	le.PutUint32(b[88+60:], headers)
	le.PutUint32(b[88+108:], 16)
	for i, s := range []struct {
		name string
		data []byte
	}{{".rodata", text}, {".sdmagic", []byte("#### LoaderInfo: systemd-boot 262-1 ####")}} {
		h := b[328+40*i:]
		copy(h, s.name)
		le.PutUint32(h[8:], uint32(len(s.data)))
		le.PutUint32(h[12:], uint32(0x1000*(i+1)))
		le.PutUint32(h[16:], 512)
		le.PutUint32(h[20:], uint32(len(b)))
		b = append(b, append(s.data, make([]byte, 512-len(s.data))...)...)
	}
	l, err := uki.ParseLoader(b)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// The log of a boot gives PCR 1 to boots that measure what that one did. The logs are
// genuine.
func TestPCR1IsNotTakenFromABootThatMeasuredOtherTables(t *testing.T) {
	older, newer := systemdBoot(t, "LoaderInfo"), systemdBoot(t, "smbios:type1")
	for _, tt := range []struct {
		log  string
		boot *uki.Loader
		pcr  uint32
		why  string
	}{
		{"uki-stub252sdboot", older, 1, ""},
		{"uki-stub252sdboot", newer, 1, "none did in the boot of the event log"},
		{"uki-stub262", newer, 1, ""},
		{"uki-stub262", older, 1, "none of this boot does"},
		{"uki-stub262", nil, 1, ""},
		{"uki-stub252sdboot", newer, 0, ""},
	} {
		raw, err := os.ReadFile("../../attestation/tpm/testdata/" + tt.log + ".eventlog")
		if err != nil {
			t.Fatal(err)
		}
		log, err := tpm.ParseEventLog(raw)
		if err != nil {
			t.Fatal(err)
		}
		files := &tpmFiles{log: log, hasLog: true}
		if tt.boot != nil {
			files.boot = &uki.Boot{Loaders: []*uki.Loader{tt.boot}}
		}
		ref, why, err := (&Request{}).reference(tt.pcr, files)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(why, tt.why) || (why == "") != (tt.why == "") || (why == "") != (len(ref.Accept) == 1) {
			t.Errorf("PCR %d of %s: %q, want %q; accepted %v", tt.pcr, tt.log, why, tt.why, ref.Accept)
		}
	}
}
