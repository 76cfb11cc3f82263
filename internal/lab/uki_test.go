package lab

import (
	"bytes"
	"debug/pe"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCommandLineEndsWithTheWordsThatWereAdded(t *testing.T) {
	got := CommandLine("a=1", "b")
	if !strings.HasPrefix(got, "console=ttyS0 ") || !strings.HasSuffix(got, " a=1 b") || strings.Contains(got, "  ") {
		t.Errorf("%q", got)
	}
	if CommandLine() == got || strings.HasSuffix(CommandLine(), " ") {
		t.Errorf("%q", CommandLine())
	}
}

func TestUKIHasItsPartsInSections(t *testing.T) {
	dir := t.TempDir()
	kernel, initrd, out := filepath.Join(dir, "kernel"), filepath.Join(dir, "initrd"), filepath.Join(dir, "uki")
	for path, content := range map[string]string{kernel: strings.Repeat("kernel", 5000), initrd: "initrd"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	uki := UKI{Kernel: &Kernel{Image: kernel}, Initrd: initrd, Command: "quiet word=1"}
	if err := uki.Build(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	file, err := pe.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	stub, err := pe.Open(StubPath)
	if err != nil {
		t.Fatal(err)
	}
	defer stub.Close()
	// It is measured, so an image that has today's differs from yesterday's.
	if got, want := file.TimeDateStamp, stub.TimeDateStamp; got != want {
		t.Errorf("the image's date is %d, that of the stub is %d", got, want)
	}
	end := uint32(0)
	for _, s := range file.Sections {
		if s.VirtualAddress < end {
			t.Errorf("section %s overlaps the one before", s.Name)
		}
		end = s.VirtualAddress + s.VirtualSize
	}
	for name, want := range map[string]string{
		".osrel": osRelease, ".cmdline": "quiet word=1", ".linux": strings.Repeat("kernel", 5000), ".initrd": "initrd",
	} {
		section := file.Section(name)
		if section == nil {
			t.Errorf("no section %s", name)
			continue
		}
		// What counts, and is measured, is the virtual size; the file is padded.
		data, err := section.Data()
		if err != nil || !bytes.Equal(data[:section.VirtualSize], []byte(want)) {
			t.Errorf("section %s: %d bytes, %v; want %d", name, section.VirtualSize, err, len(want))
		}
	}
	if err := os.WriteFile(initrd, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := uki.Build(t.Context(), out); err == nil {
		t.Error("an image with an empty initrd was built")
	}
}
