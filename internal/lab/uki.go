package lab

import (
	"bytes"
	"cmp"
	"context"
	"debug/pe"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// StubPath is this machine's systemd-stub: it measures each section of the image
// that it is part of into PCR 11, then starts the kernel in it.
const StubPath = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"

const osRelease = "ID=debian\nVERSION_ID=12\n"

// CommandLine returns the kernel command line of a guest, with words added to
// it. What it sets makes an emulated machine quicker and its console quiet.
func CommandLine(words ...string) string {
	base := []string{
		"console=ttyS0", "quiet", "loglevel=3", "panic=-1", "mitigations=off", "nokaslr",
		"cryptomgr.notests", "random.trust_cpu=on", "tsc=reliable", "no_timer_check", "net.ifnames=0",
	}
	return strings.Join(append(base, words...), " ")
}

// UKI is a unified kernel image: stub, kernel, initrd and command line in one
// EFI program, so that one measurement covers them.
type UKI struct {
	Kernel  *Kernel
	Initrd  string // path
	Command string // see [CommandLine]
	// Stub is the path of the stub. Empty: [StubPath].
	Stub string
	// Sections follow the usual ones. A name may be there more than once.
	Sections []Section
}

// Section is a part of an EFI program.
type Section struct {
	Name string
	Data []byte
}

// Build writes the image to out. The same inputs give the same bytes.
func (u UKI) Build(ctx context.Context, out string) error {
	if err := u.build(out); err != nil {
		return fmt.Errorf("build unified kernel image: %w", err)
	}
	return nil
}

func (u UKI) build(out string) error {
	stub, err := os.ReadFile(cmp.Or(u.Stub, StubPath))
	if err != nil {
		return err
	}
	sections := []Section{{".osrel", []byte(osRelease)}, {".cmdline", []byte(u.Command)}}
	for _, file := range []struct{ name, path string }{{".linux", u.Kernel.Image}, {".initrd", u.Initrd}} {
		data, err := os.ReadFile(file.path)
		if err != nil {
			return err
		}
		sections = append(sections, Section{file.name, data})
	}
	image, err := addSections(stub, append(sections, u.Sections...))
	if err != nil {
		return err
	}
	return writeFile(out, image)
}

// Offsets in the headers of a 64-bit PE file, see the PE/COFF specification.
const (
	peSections     = 2  // in the COFF header: number of sections
	peOptionalSize = 16 // in the COFF header
	peImageSize    = 56 // in the optional header
	peHeaderSize   = 60 // in the optional header
	peSectionSize  = 40 // of an entry of the section table
)

// addSections appends sections to an EFI program, as objcopy does, but that
// objcopy cannot add two of one name. The program's date, which is measured with
// the header, stays what it is.
func addSections(program []byte, sections []Section) ([]byte, error) {
	file, err := pe.NewFile(bytes.NewReader(program))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	header, ok := file.OptionalHeader.(*pe.OptionalHeader64)
	if !ok {
		return nil, fmt.Errorf("not a 64-bit EFI program")
	}
	le := binary.LittleEndian
	out := bytes.Clone(program)
	coff := int(le.Uint32(out[0x3c:])) + 4
	optional := coff + 20
	table := optional + int(le.Uint16(out[coff+peOptionalSize:])) + len(file.Sections)*peSectionSize
	if table+len(sections)*peSectionSize > int(header.SizeOfHeaders) {
		return nil, fmt.Errorf("its header has no room for %d more sections", len(sections))
	}
	var next uint32
	for _, s := range file.Sections {
		next = max(next, alignSection(s.VirtualAddress+s.VirtualSize))
	}
	for _, s := range sections {
		if len(s.Data) == 0 || len(s.Name) > 8 {
			return nil, fmt.Errorf("section %s of %d bytes", s.Name, len(s.Data))
		}
		const alignment = 512
		out = append(out, make([]byte, -len(out)&(alignment-1))...)
		raw := (len(s.Data) + alignment - 1) &^ (alignment - 1)
		entry := out[table : table+peSectionSize]
		clear(entry)
		copy(entry, s.Name)
		le.PutUint32(entry[8:], uint32(len(s.Data)))
		le.PutUint32(entry[12:], next)
		le.PutUint32(entry[16:], uint32(raw))
		le.PutUint32(entry[20:], uint32(len(out)))
		le.PutUint32(entry[36:], 0x40000040) // initialised data, readable
		out = append(append(out, s.Data...), make([]byte, raw-len(s.Data))...)
		next = alignSection(next + uint32(len(s.Data)))
		table += peSectionSize
	}
	le.PutUint16(out[coff+peSections:], uint16(len(file.Sections)+len(sections)))
	le.PutUint32(out[optional+peImageSize:], next)
	return out, nil
}

func alignSection(n uint32) uint32 { return (n + 0xfff) &^ 0xfff }

// Sign signs an EFI program for firmware with Secure Boot.
func Sign(ctx context.Context, in, out string) error {
	temp, err := os.MkdirTemp(filepath.Dir(out), ".sign-")
	if err != nil {
		return fmt.Errorf("sign: %w", err)
	}
	defer os.RemoveAll(temp)
	key := filepath.Join(temp, "key")
	if _, err := run(ctx, "openssl", "rsa", "-in", secureKey, "-passin", "pass:snakeoil", "-out", key); err != nil {
		return fmt.Errorf("sign: %w", err)
	}
	if _, err := run(ctx, "sbsign", "--key", key, "--cert", secureCert, "--output", out, in); err != nil {
		return fmt.Errorf("sign: %w", err)
	}
	return nil
}

// BuildESP writes a FAT image to out from which firmware starts the given EFI
// program without any boot entry.
func BuildESP(ctx context.Context, uki, out string) error {
	return BuildESPFiles(ctx, []File{{Path: "/EFI/BOOT/BOOTX64.EFI", Source: uki}}, out)
}

// BuildESPFiles writes a FAT image with these files to out. Firmware starts
// /EFI/BOOT/BOOTX64.EFI.
func BuildESPFiles(ctx context.Context, files []File, out string) error {
	if err := buildESP(ctx, files, out); err != nil {
		return fmt.Errorf("build EFI system partition: %w", err)
	}
	return nil
}

func buildESP(ctx context.Context, files []File, out string) error {
	var total int64
	dirs := map[string]bool{}
	for _, f := range files {
		_, data, err := f.read()
		if err != nil {
			return err
		}
		total += int64(len(data))
		for dir := path.Dir(f.Path); dir != "/"; dir = path.Dir(dir) {
			dirs["::"+dir] = true
		}
	}
	temp := out + ".new"
	file, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	// FAT32 needs 65 525 clusters: with 512-byte sectors, 34 MiB.
	const mib = 1 << 20
	size := max(total/mib+4, 36) * mib
	if err := file.Truncate(size); err != nil {
		file.Close()
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	if _, err := run(ctx, "mkfs.vfat", "--invariant", "-F", "32", temp); err != nil {
		return err
	}
	if _, err := run(ctx, "mmd", append([]string{"-i", temp}, slices.Sorted(maps.Keys(dirs))...)...); err != nil {
		return err
	}
	for _, f := range files {
		_, data, err := f.read()
		if err != nil {
			return err
		}
		if _, err := (invocation{stdin: data}).run(ctx, "mcopy", "-i", temp, "-", "::"+f.Path); err != nil {
			return err
		}
	}
	return os.Rename(temp, out)
}
