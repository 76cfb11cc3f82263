package bed

import (
	"context"
	"debug/pe"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// stubPath is systemd's EFI stub: it measures each section of the image that it
// is part of into PCR 11, then starts the kernel in it.
const stubPath = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"

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
}

// Build writes the image to out. The same inputs give the same bytes.
func (u UKI) Build(ctx context.Context, out string) error {
	if err := u.build(ctx, out); err != nil {
		return fmt.Errorf("build unified kernel image: %w", err)
	}
	return nil
}

func (u UKI) build(ctx context.Context, out string) error {
	temp, err := os.MkdirTemp(filepath.Dir(out), ".uki-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	osrel, cmdline := filepath.Join(temp, "osrel"), filepath.Join(temp, "cmdline")
	if err := os.WriteFile(osrel, []byte(osRelease), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(cmdline, []byte(u.Command), 0o644); err != nil {
		return err
	}
	next, err := endOfImage(stubPath)
	if err != nil {
		return err
	}
	var args []string
	for _, section := range []struct{ name, path string }{
		{".osrel", osrel}, {".cmdline", cmdline}, {".linux", u.Kernel.Image}, {".initrd", u.Initrd},
	} {
		info, err := os.Stat(section.path)
		if err != nil {
			return err
		}
		if info.Size() == 0 {
			return fmt.Errorf("section %s: %s is empty", section.name, section.path)
		}
		args = append(args,
			"--add-section", section.name+"="+section.path,
			"--set-section-flags", section.name+"=data,readonly",
			"--change-section-vma", fmt.Sprintf("%s=%#x", section.name, next))
		next = alignSection(next + uint64(info.Size()))
	}
	image := filepath.Join(temp, "uki")
	// The PE header, which is measured, has a date: the stub's is to stay in it.
	if _, err := run(ctx, "objcopy", append(args, "--preserve-dates", stubPath, image)...); err != nil {
		return err
	}
	return os.Rename(image, out)
}

// endOfImage returns the first free address behind the sections of a PE file.
func endOfImage(path string) (uint64, error) {
	file, err := pe.Open(path)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	defer file.Close()
	header, ok := file.OptionalHeader.(*pe.OptionalHeader64)
	if !ok {
		return 0, fmt.Errorf("%s is not a 64-bit EFI program", path)
	}
	var end uint64
	for _, s := range file.Sections {
		end = max(end, uint64(s.VirtualAddress)+uint64(s.VirtualSize))
	}
	return header.ImageBase + alignSection(end), nil
}

func alignSection(n uint64) uint64 { return (n + 0xfff) &^ 0xfff }

// BuildESP writes a FAT image to out from which firmware starts the given EFI
// program without any boot entry.
func BuildESP(ctx context.Context, uki, out string) error {
	if err := buildESP(ctx, uki, out); err != nil {
		return fmt.Errorf("build EFI system partition: %w", err)
	}
	return nil
}

func buildESP(ctx context.Context, uki, out string) error {
	info, err := os.Stat(uki)
	if err != nil {
		return err
	}
	temp := out + ".new"
	file, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	// FAT32 needs 65 525 clusters: with 512-byte sectors, 34 MiB.
	const mib = 1 << 20
	size := max(info.Size()/mib+4, 36) * mib
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
	if _, err := run(ctx, "mmd", "-i", temp, "::EFI", "::EFI/BOOT"); err != nil {
		return err
	}
	if _, err := run(ctx, "mcopy", "-i", temp, uki, "::EFI/BOOT/BOOTX64.EFI"); err != nil {
		return err
	}
	return os.Rename(temp, out)
}
