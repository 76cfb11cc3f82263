package lab

import (
	"context"
	"embed"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

//go:embed guest
var guestFiles embed.FS

// File is something to put into a guest. Exactly one of Source, Data and Link is
// used, in this order of precedence; none of them makes an empty file.
type File struct {
	Path   string      // where in the guest, absolute
	Source string      // a file of this machine
	Data   []byte      // the content itself
	Link   string      // the target of a symbolic link
	Mode   fs.FileMode // permission bits; 0: those of Source, else 0644
}

// smallModules is what the small guest loads, besides what the caller asks for.
// File system, TPM driver, keyring and SHA-256 are built into the cloud kernel.
var smallModules = []string{
	"virtio_pci", "virtio_blk", "virtio_net",
	"dm-mod", "dm-crypt", "xts", "aesni-intel",
	"algif_skcipher", // or libcryptsetup opens keyslots through a temporary dm device
}

// Initramfs describes the small guest: busybox, modules, programs, one script.
// It has no other root file system, so the whole guest is in what is measured.
type Initramfs struct {
	Kernel   *Kernel
	Programs []File   // Source is a program: the libraries that it needs come along
	Files    []File   // anything else
	Modules  []string // modules beyond virtio, dm-crypt, XTS and AES-NI
	// Script is run by sh as root once devices and network are up. The guest
	// powers off when it ends; [Guest.Wait] returns its exit status. The shell
	// functions mark, await, section, pcrs and eventlog are there. The shell is
	// busybox's and prefers its own applets: other programs of the same name, such
	// as mke2fs, need their path.
	Script string
}

// Build writes the initramfs to out. The same inputs give the same bytes.
func (i Initramfs) Build(ctx context.Context, out string) error {
	if err := i.build(ctx, out); err != nil {
		return fmt.Errorf("build initramfs: %w", err)
	}
	return nil
}

func (i Initramfs) build(ctx context.Context, out string) error {
	a := newArchive()
	for _, dir := range []string{"dev", "proc", "run", "sys", "tmp", "mnt", "etc", "sbin"} {
		a.dir(dir)
	}
	if err := addModules(ctx, a, i.Kernel, append(smallModules[:len(smallModules):len(smallModules)], i.Modules...)); err != nil {
		return err
	}
	programs := i.Programs
	for _, name := range []string{"mke2fs", "e2fsck"} {
		path, err := tool(name)
		if err != nil {
			return err
		}
		programs = append([]File{{Path: "/sbin/" + name, Source: path}}, programs...)
	}
	for _, p := range programs {
		if err := addProgram(a, p); err != nil {
			return err
		}
	}
	if err := addBusybox(ctx, a, programs); err != nil {
		return err
	}
	for _, f := range i.Files {
		if err := addFile(a, f); err != nil {
			return err
		}
	}
	a.add("/init", 0o755, guestFile("init.sh"))
	a.add("/bed/lib.sh", 0o644, guestFile("lib.sh"))
	a.add("/bed/script", 0o644, []byte(". /bed/lib.sh\n"+i.Script))
	return compress(ctx, a.bytes(), out)
}

// compress writes an initramfs. Under an emulated CPU both the firmware, which
// reads and hashes it several times, and the kernel, which unpacks it, count:
// zstd is nearly as small as xz and nearly as quick to unpack as nothing at all.
func compress(ctx context.Context, cpio []byte, out string) error {
	data, err := invocation{stdin: cpio}.run(ctx, "zstd", "-q", "-c", "-T1", zstdLevel)
	if err != nil {
		return err
	}
	return writeFile(out, data)
}

const zstdLevel = "-9"

// addBusybox adds a static busybox under the name of each of its applets, but for
// those that a real program is there for: busybox has a mke2fs too.
func addBusybox(ctx context.Context, a *archive, programs []File) error {
	path, err := tool("busybox")
	if err != nil {
		return err
	}
	if libs, err := closure(path); err != nil || len(libs) > 0 {
		return fmt.Errorf("%s must be static (Debian's busybox-static; run: make deps): it needs %q, %w", path, libs, err)
	}
	applets, err := run(ctx, "busybox", "--list")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(applets)) {
		if slices.ContainsFunc(programs, func(p File) bool { return filepath.Base(p.Path) == name }) {
			continue
		}
		a.add("/bin/"+name, fs.ModeSymlink, []byte("busybox"))
	}
	return addFile(a, File{Path: "/bin/busybox", Source: path, Mode: 0o755})
}

// addModules adds modules and the list in which init finds them, in order.
func addModules(ctx context.Context, a *archive, k *Kernel, names []string) error {
	paths, err := k.modules(ctx, names)
	if err != nil {
		return err
	}
	var list strings.Builder
	for _, rel := range paths {
		name := "/bed/" + filepath.Base(rel)
		if err := addFile(a, File{Path: name, Source: filepath.Join(k.Root, rel), Mode: 0o644}); err != nil {
			return err
		}
		list.WriteString(name + "\n")
	}
	a.add("/bed/modules", 0o644, []byte(list.String()))
	return nil
}

func addProgram(a *archive, p File) error {
	if p.Source == "" {
		return fmt.Errorf("program %s: no source", p.Path)
	}
	libs, err := closure(p.Source)
	if err != nil {
		return err
	}
	for _, lib := range libs {
		if err := addFile(a, File{Path: lib, Source: lib, Mode: 0o755}); err != nil {
			return err
		}
	}
	p.Mode = 0o755
	return addFile(a, p)
}

func addFile(a *archive, f File) error {
	mode, data, err := f.read()
	if err != nil {
		return fmt.Errorf("file %s: %w", f.Path, err)
	}
	a.add(f.Path, mode, data)
	return nil
}

// read returns the mode and content with which a file stands in the guest.
func (f File) read() (fs.FileMode, []byte, error) {
	if !filepath.IsAbs(f.Path) {
		return 0, nil, fmt.Errorf("path in the guest must be absolute")
	}
	mode := f.Mode.Perm()
	switch {
	case f.Source != "":
		info, err := os.Stat(f.Source)
		if err != nil {
			return 0, nil, err
		}
		if mode == 0 {
			mode = info.Mode().Perm()
		}
		data, err := os.ReadFile(f.Source)
		return mode, data, err
	case f.Data == nil && f.Link != "":
		return fs.ModeSymlink | 0o777, []byte(f.Link), nil
	}
	if mode == 0 {
		mode = 0o644
	}
	return mode, f.Data, nil
}

func guestFile(name string) []byte {
	data, err := guestFiles.ReadFile("guest/" + name)
	if err != nil {
		panic("lab: embedded file is missing: " + name)
	}
	return data
}

// writeFile writes a file that is either whole or not there.
func writeFile(path string, data []byte) error {
	temp := path + ".new"
	if err := os.WriteFile(temp, data, 0o644); err != nil {
		return err
	}
	return os.Rename(temp, path)
}
