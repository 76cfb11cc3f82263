package lab

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// ownRelease is the release of Debian that guests have unless another is asked for:
// this machine's own, and that of their kernel.
const ownRelease = "bookworm"

// rootPackages is what the guest with systemd has beyond Debian's minimum.
var rootPackages = []string{
	"systemd", "systemd-sysv", "udev", "dbus", "kmod", "iproute2", "e2fsprogs", "cryptsetup-bin", "ca-certificates",
}

// morePackages are what a release needs besides. Of the own one they are the libraries
// that systemd opens by name, for systemd-pcrphase. Later ones have systemd in more
// packages than one.
func morePackages(release string) []string {
	if release == ownRelease {
		return []string{"libtss2-esys-3.0.2-0", "libtss2-rc0", "libtss2-mu0", "libtss2-tcti-device0"}
	}
	return []string{"systemd-cryptsetup", "systemd-tpm", "libmount1", "libkmod2", "libseccomp2", "libselinux1", "mount"}
}

// rootModules is what that guest may load later, besides [smallModules].
var rootModules = []string{
	"autofs4", "configfs", "dm-integrity", "dm-verity", "efivarfs", "fuse", "loop", "overlay", "virtio_console", "virtio_rng",
}

// bootNothing are units that cost seconds under emulation and serve nobody here.
var bootNothing = []string{
	"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
	"fstrim.timer", "getty@.service", "serial-getty@.service", "systemd-hwdb-update.service", "systemd-timesyncd.service",
}

// laterNothing are such units of releases after the own one.
var laterNothing = []string{
	"dbus.service", "dbus.socket", "dev-hugepages.mount", "dev-mqueue.mount", "ldconfig.service", "modprobe@drm.service", "modprobe@efi_pstore.service",
	"sys-fs-fuse-connections.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "systemd-creds.socket",
	"systemd-cryptenroll.socket", "systemd-factory-reset.socket", "systemd-hostnamed.socket", "systemd-journal-catalog-update.service",
	"systemd-journalctl.socket", "systemd-logind.service", "systemd-logind-varlink.socket", "systemd-mute-console.socket",
	"systemd-random-seed.service", "systemd-sysext.socket", "systemd-sysinstall.socket", "systemd-sysusers.service",
	"systemd-tmpfiles-clean.timer", "systemd-udev-load-credentials.service", "systemd-update-done.service",
}

// Rootfs describes the root file system of the guest with systemd: Debian 12,
// small, its services masked that nobody needs.
type Rootfs struct {
	Kernel *Kernel
	// Files are put on top of Debian: programs, units, the links that enable them,
	// configuration. Libraries do not come along; libcryptsetup is there.
	Files []File
	// Script is run by sh as root after multi-user.target, and the guest powers off
	// when it ends, as in [Initramfs].
	Script string
}

// Rootfs writes the file system as an ext4 image to out. Debian itself comes
// from the cache, or from apt's mirror, which takes minutes. It must be root.
func (c *Cache) Rootfs(ctx context.Context, r Rootfs, out string) error {
	if err := c.rootfs(ctx, r, out); err != nil {
		return fmt.Errorf("build root file system: %w", err)
	}
	return nil
}

func (c *Cache) rootfs(ctx context.Context, r Rootfs, out string) error {
	base, err := c.baseImage(ctx, r.Kernel)
	if err != nil {
		return err
	}
	temp := out + ".new"
	if _, err := run(ctx, "cp", "--sparse=always", "--reflink=auto", base, temp); err != nil {
		return err
	}
	script := File{Path: "/bed/script", Data: []byte(". /bed/lib.sh\n" + r.Script)}
	if err := injectFiles(ctx, temp, append(r.Files[:len(r.Files):len(r.Files)], script)); err != nil {
		return err
	}
	return os.Rename(temp, out)
}

// Debian returns the path of a tar file with a minimal Debian of a release, and more
// packages.
func (c *Cache) Debian(ctx context.Context, release string, more ...string) (string, error) {
	sources, content, err := c.sources(ctx, release)
	if err != nil {
		return "", err
	}
	packages := slices.Concat(rootPackages, morePackages(release), more)
	inputs := append([]string{release, content}, packages...)
	dir, err := c.entry(ctx, "debian", inputs, func(dir string) error {
		if os.Geteuid() != 0 {
			return fmt.Errorf("only root can make files of other owners: run as root once, afterwards it is cached")
		}
		// A mirror may be older than its lists shall be. This machine's apt says whether
		// that matters, and mmdebstrap does not read it.
		age, err := run(ctx, "apt-config", "dump", "--format", "%v", "Acquire::Check-Valid-Until")
		if err != nil {
			return err
		}
		_, err = run(ctx, "mmdebstrap", "--quiet", "--variant=minbase", "--mode=root",
			"--include="+strings.Join(packages, ","),
			`--aptopt=Acquire::Languages "none"`, "--aptopt=Acquire::Check-Valid-Until "+cmp.Or(string(age), "true"), "--skip=check/empty",
			"--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
			"--dpkgopt=path-exclude=/usr/share/doc/*",
			release, filepath.Join(dir, "root.tar"), sources)
		return err
	})
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "root.tar"), nil
}

// sources returns where mmdebstrap gets a release from, as it takes it, and what tells
// one state of the release from another.
func (c *Cache) sources(ctx context.Context, release string) (sources, content string, err error) {
	if release == ownRelease {
		return aptSources()
	}
	mirror, err := debianMirror(ctx)
	if err != nil {
		return "", "", err
	}
	// One that is not released changes each day: systemd is what it is asked for.
	_, version, err := c.find(ctx, release, "systemd")
	if err != nil {
		return "", "", err
	}
	line := sourceLine(mirror, release)
	return line, line + version, nil
}

// aptSources returns the file that says where this machine gets Debian from:
// the guest's comes from the same mirror.
func aptSources() (path, content string, err error) {
	for _, path := range []string{"/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"} {
		data, err := os.ReadFile(path)
		if err == nil && len(strings.TrimSpace(string(data))) > 0 {
			return path, string(data), nil
		}
	}
	return "", "", fmt.Errorf("found no apt sources of Debian")
}

// baseImage returns an ext4 image of Debian with the kernel's modules and with
// what is the same in every guest, which nobody may write to.
func (c *Cache) baseImage(ctx context.Context, k *Kernel) (string, error) {
	tar, err := c.Debian(ctx, ownRelease)
	if err != nil {
		return "", err
	}
	overlay, err := baseFiles(ctx, k, ownRelease)
	if err != nil {
		return "", err
	}
	inputs := []string{tar, k.Release}
	for _, f := range overlay {
		inputs = append(inputs, f.Path, f.Source, f.Link, string(f.Data))
	}
	dir, err := c.entry(ctx, "base", inputs, func(dir string) error {
		return makeBase(ctx, dir, tar, k, overlay)
	})
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "base.img"), nil
}

// baseFiles are the files that every guest with systemd has.
func baseFiles(ctx context.Context, k *Kernel, release string) ([]File, error) {
	const units = "/etc/systemd/system/"
	files := []File{
		{Path: "/bed/lib.sh", Data: guestFile("lib.sh")},
		{Path: units + "bed-network.service", Data: guestFile("bed-network.service")},
		{Path: units + "bed-script.service", Data: guestFile("bed-script.service")},
		{Path: units + "network-online.target.wants/bed-network.service", Link: "../bed-network.service"},
		{Path: units + "multi-user.target.wants/bed-network.service", Link: "../bed-network.service"},
		{Path: units + "multi-user.target.wants/bed-script.service", Link: "../bed-script.service"},
		{Path: "/etc/hostname", Data: []byte("keyagent-guest\n")},
		// A machine that has an identity skips everything that is for a first boot.
		{Path: "/etc/machine-id", Data: []byte("6b6579616765746e7400000000000001\n")},
		{Path: "/etc/fstab", Data: []byte("# the initrd mounts the root file system\n")},
	}
	nothing := bootNothing
	if release != ownRelease {
		nothing = slices.Concat(nothing, laterNothing)
	}
	for _, unit := range nothing {
		files = append(files, File{Path: units + unit, Link: "/dev/null"})
	}
	modules, err := k.modules(ctx, append(smallModules[:len(smallModules):len(smallModules)], rootModules...))
	if err != nil {
		return nil, err
	}
	lists := "lib/modules/" + k.Release + "/"
	for _, rel := range append(modules, lists+"modules.order", lists+"modules.builtin", lists+"modules.builtin.modinfo") {
		files = append(files, File{Path: "/usr/" + rel, Source: filepath.Join(k.Root, rel), Mode: 0o644})
	}
	return files, nil
}

func makeBase(ctx context.Context, dir, tar string, k *Kernel, files []File) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("only root can make files of other owners: run as root once, afterwards it is cached")
	}
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	if err := unpackBase(ctx, tree, tar, files); err != nil {
		return err
	}
	if _, err := run(ctx, "depmod", "-b", tree, k.Release); err != nil {
		return err
	}
	if _, err := run(ctx, "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", tree,
		filepath.Join(dir, "base.img"), "384M"); err != nil {
		return err
	}
	return os.RemoveAll(tree)
}

// unpackBase unpacks Debian into a tree, and places files in it.
func unpackBase(ctx context.Context, tree, tar string, files []File) error {
	if _, err := run(ctx, "tar", "-C", tree, "-xf", tar); err != nil {
		return err
	}
	for _, waste := range []string{"var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"} {
		if err := os.RemoveAll(filepath.Join(tree, waste)); err != nil {
			return err
		}
	}
	for _, f := range files {
		if err := placeFile(tree, f); err != nil {
			return fmt.Errorf("file %s: %w", f.Path, err)
		}
	}
	return nil
}

// placeFile puts a file into a tree in which nothing of the caller's stands: a
// link of Debian's that is in its way is replaced.
func placeFile(tree string, f File) error {
	path := filepath.Join(tree, f.Path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	if f.Link != "" {
		return os.Symlink(f.Link, path)
	}
	mode, data, err := f.read()
	if err != nil {
		return err
	}
	return os.WriteFile(path, data, mode)
}

// BuildRootInitrd writes the initrd to out that mounts the disk of
// [Options.Root] and starts systemd there.
func BuildRootInitrd(ctx context.Context, k *Kernel, out string) error {
	a := newArchive()
	for _, dir := range []string{"dev", "proc", "sys", "mnt"} {
		a.dir(dir)
	}
	err := addBusybox(ctx, a, nil)
	if err == nil {
		err = addModules(ctx, a, k, smallModules)
	}
	if err == nil {
		a.add("/init", 0o755, guestFile("root-init.sh"))
		a.add("/bed/lib.sh", 0o644, guestFile("lib.sh"))
		err = compress(ctx, a.bytes(), out)
	}
	if err != nil {
		return fmt.Errorf("build initrd: %w", err)
	}
	return nil
}
