package lab

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// System is a whole Debian, which makes its own initrd and has its root file system on
// a disk that the initrd opens. It is made as an image builder would: packages, files,
// and commands that run inside.
type System struct {
	Kernel   *Kernel
	Release  string   // of Debian; empty: 12
	Packages []string // beyond Debian's minimum
	Files    []File
	// Setup is run by sh as root inside, with /proc, /sys and /dev, after the files were
	// placed. It leaves the initrds that it makes in /boot.
	Setup string
	// Script is run after multi-user.target, as in [Rootfs].
	Script string
}

// Built are what a system is made into.
type Built struct {
	Image string // the root file system, ext4
	Boot  string // the folder with what Setup left in /boot
}

// Build makes the system in dir, with an image of a size, such as 500M. It must be root.
func (s System) Build(ctx context.Context, c *Cache, dir, size string) (*Built, error) {
	out, err := s.build(ctx, c, dir, size)
	if err != nil {
		return nil, fmt.Errorf("build a system: %w", err)
	}
	return out, nil
}

// assemble lays a folder over Debian, runs what is to be run inside, and writes the
// image. Mounts of a namespace of their own end with it, whatever happens.
const assemble = `
base=$1 dir=$2 size=$3
mount -t tmpfs -o size=2g none "$dir/over"
mkdir "$dir/over/upper" "$dir/over/work"
mount -t overlay -o "lowerdir=$base,upperdir=$dir/over/upper,workdir=$dir/over/work" none "$dir/tree"
cp -a "$dir/files/." "$dir/tree"
for d in proc sys dev; do mount --rbind /$d "$dir/tree/$d"; done
chroot "$dir/tree" sh /bed/setup
umount -l "$dir/tree/proc" "$dir/tree/sys" "$dir/tree/dev"
rm "$dir/tree/bed/setup"
cp -a "$dir/tree/boot" "$dir/boot"
mke2fs -q -t ext4 -b 4096 -m 0 -d "$dir/tree" "$dir/root.img" "$size"
`

func (s System) build(ctx context.Context, c *Cache, dir, size string) (*Built, error) {
	base, err := c.systemTree(ctx, s.Kernel, cmp.Or(s.Release, ownRelease), s.Packages)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"files", "tree", "over"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			return nil, err
		}
	}
	files := append(s.Files[:len(s.Files):len(s.Files)],
		File{Path: "/bed/script", Data: []byte(". /bed/lib.sh\n" + s.Script)},
		File{Path: "/bed/setup", Data: []byte("set -e\n" + s.Setup)})
	for _, f := range files {
		if err := placeFile(filepath.Join(dir, "files"), f); err != nil {
			return nil, fmt.Errorf("file %s: %w", f.Path, err)
		}
	}
	if _, err := run(ctx, "unshare", "--mount", "sh", "-ec", assemble, "assemble", base, dir, size); err != nil {
		return nil, err
	}
	return &Built{Image: filepath.Join(dir, "root.img"), Boot: filepath.Join(dir, "boot")}, nil
}

// systemTree returns a folder with Debian and all modules of the kernel, which nobody may
// write to.
func (c *Cache) systemTree(ctx context.Context, k *Kernel, release string, packages []string) (string, error) {
	tar, err := c.Debian(ctx, release, packages...)
	if err != nil {
		return "", err
	}
	overlay, err := baseFiles(ctx, k, release)
	if err != nil {
		return "", err
	}
	inputs := []string{tar, k.Release}
	for _, f := range overlay {
		inputs = append(inputs, f.Path, f.Source, f.Link, string(f.Data))
	}
	dir, err := c.entry(ctx, "system", inputs, func(dir string) error {
		tree := filepath.Join(dir, "tree")
		if err := os.Mkdir(tree, 0o755); err != nil {
			return err
		}
		if err := unpackBase(ctx, tree, tar, overlay); err != nil {
			return err
		}
		for _, from := range []string{"lib/modules/" + k.Release, "boot"} {
			to := filepath.Join(tree, strings.Replace(from, "lib/", "usr/lib/", 1))
			if _, err := run(ctx, "cp", "-a", "--no-target-directory", filepath.Join(k.Root, from), to); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "tree"), nil
}
