package confine

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// machine is a program of a few instructions, which ends with the error number of a call.
func machine(t *testing.T, code string) string {
	t.Helper()
	const base, start = 0x400000, 64 + 56
	var b bytes.Buffer
	b.WriteString("\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9))
	for _, field := range []any{
		uint16(2), uint16(62), uint32(1), uint64(base + start), uint64(64), uint64(0), uint32(0), uint16(64), uint16(56), uint16(1), uint16(0), uint16(0), uint16(0),
		uint32(1), uint32(5), uint64(0), uint64(base), uint64(base), uint64(start + len(code)), uint64(start + len(code)), uint64(0x1000),
	} {
		if err := binary.Write(&b, binary.LittleEndian, field); err != nil {
			t.Fatal(err)
		}
	}
	b.WriteString(code)
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, b.Bytes(), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// Calls of another architecture have other numbers, and any process may make them. None is
// let through, not even one that does no harm.
func TestCallsOfAnotherArchitectureAreRefused(t *testing.T) {
	const exit = "\xf7\xd8" + // neg eax: the error number, or more than a byte
		"\x89\xc7" + // mov edi, eax
		"\xb8\xe7\x00\x00\x00\x0f\x05" // exit_group
	for name, code := range map[string]string{
		"i386": "\xb8\x14\x00\x00\x00\xcd\x80", // getpid by int 0x80
		"x32":  "\xb8\x27\x00\x00\x40\x0f\x05", // getpid
	} {
		path := machine(t, code+exit)
		free := confined(t, order{Try: []string{"run " + path}})
		if name == "i386" && strings.Contains(free, "exit status 139") { // SIGSEGV
			t.Log("this kernel does not run calls of i386")
			continue
		}
		if strings.Contains(free, "exit status 1\n") {
			t.Fatalf("%s without a filter: %s", name, free)
		}
		for _, w := range []Work{Keys, Volumes, Commands} {
			if got := confined(t, order{Work: works(w), Try: []string{"run " + path}}); !strings.HasSuffix(got, "exit status 1\n") {
				t.Errorf("%s, work %d: %s", name, w, got)
			}
		}
	}
}
