package eventlog

import (
	"strings"
	"testing"

	"github.com/google/go-eventlog/tcg"
)

func TestEventsReadAsAPersonWouldSayThem(t *testing.T) {
	utf16 := func(s string) (out []byte) {
		for _, r := range s {
			out = append(out, byte(r), 0)
		}
		return append(out, 0, 0)
	}
	for _, c := range []struct {
		name string
		in   tcg.Event
		want string
	}{
		{"a part of a kernel image", tcg.Event{Type: tcg.Ipl, Data: utf16(".cmdline")}, "kernel command line (.cmdline)"},
		{"a boot loader's own words", tcg.Event{Type: tcg.Ipl, Data: utf16("grub")}, "boot loader: grub"},
		{"control characters", tcg.Event{Type: tcg.EFIAction, Data: []byte("a\x1b[2Jb")}, "a·[2Jb"},
		{"a variable that cannot be read", tcg.Event{Type: tcg.EFIVariableBoot2, Data: []byte{1}}, "EFI variable"},
		{"a type that nobody knows", tcg.Event{Type: 0x1234}, "0x1234"},
		{"endless data", tcg.Event{Type: tcg.EFIAction, Data: []byte(strings.Repeat("x", 9000))}, strings.Repeat("x", maxDetail) + "…"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := Describe(1, c.in); got.Name != c.want || got.Seq != 1 {
				t.Errorf("%+v, want %q", got, c.want)
			}
		})
	}
}
