package lab

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strings"
)

// kernelMeta is the Debian package that always depends on the newest cloud
// kernel: small, few modules, virtio only.
const kernelMeta = "linux-image-cloud-amd64"

// Kernel is an unpacked kernel package. Nothing of it is installed.
type Kernel struct {
	Release string // as uname -r says it
	Image   string // the bzImage with its EFI stub
	Root    string // the folder that holds lib/modules/<Release>
}

// Kernel downloads and unpacks Debian's cloud kernel, or returns the cached one
// if apt still names the same version.
func (c *Cache) Kernel(ctx context.Context) (*Kernel, error) {
	pkg, version, err := kernelPackage(ctx)
	if err != nil {
		return nil, fmt.Errorf("find kernel package: %w", err)
	}
	release := strings.TrimPrefix(pkg, "linux-image-")
	dir, err := c.entry(ctx, "kernel", []string{pkg, version}, func(dir string) error {
		if err := unpackKernel(ctx, dir, pkg, release); err != nil {
			return fmt.Errorf("unpack %s: %w", pkg, err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &Kernel{
		Release: release,
		Image:   filepath.Join(dir, "boot", "vmlinuz-"+release),
		Root:    dir,
	}, nil
}

// kernelPackage asks apt's local lists which package and version the
// metapackage stands for.
func kernelPackage(ctx context.Context) (pkg, version string, err error) {
	out, err := run(ctx, "apt-cache", "show", "--no-all-versions", kernelMeta)
	if err != nil {
		return "", "", fmt.Errorf("%w (are apt's package lists there? run: make deps)", err)
	}
	scan := bufio.NewScanner(bytes.NewReader(out))
	for scan.Scan() {
		field, value, _ := strings.Cut(scan.Text(), ": ")
		switch field {
		case "Version":
			version = value
		case "Depends":
			pkg, _, _ = strings.Cut(value, " ")
		}
	}
	if !strings.HasPrefix(pkg, "linux-image-") || version == "" {
		return "", "", fmt.Errorf("apt knows no kernel behind %s; run: make deps", kernelMeta)
	}
	return pkg, version, nil
}

func unpackKernel(ctx context.Context, dir, pkg, release string) error {
	// The sandbox user of apt cannot write to a private folder, and warns.
	inv := invocation{dir: dir}
	if _, err := inv.run(ctx, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", pkg); err != nil {
		return err
	}
	if err := unpack(ctx, dir); err != nil {
		return err
	}
	_, err := run(ctx, "depmod", "-b", dir, release)
	return err
}

// modules returns the paths below Root of the named modules and of all that
// they depend on, in the order in which they must be loaded. A name that is
// built into the kernel adds nothing.
func (k *Kernel) modules(ctx context.Context, names []string) ([]string, error) {
	var paths []string
	seen := map[string]bool{}
	for _, name := range names {
		// Without -C the answer would depend on this machine's modprobe.d.
		out, err := run(ctx, "modprobe", "-C", "/dev/null", "-d", k.Root, "-S", k.Release, "--show-depends", name)
		if err != nil {
			return nil, fmt.Errorf("module %s: %w", name, err)
		}
		for line := range strings.Lines(string(out)) {
			verb, path, _ := strings.Cut(strings.TrimSpace(line), " ")
			if verb != "insmod" {
				continue
			}
			rel, err := filepath.Rel(k.Root, strings.TrimSpace(path))
			if err != nil {
				return nil, fmt.Errorf("module %s: %w", name, err)
			}
			if !seen[rel] {
				seen[rel] = true
				paths = append(paths, rel)
			}
		}
	}
	return paths, nil
}
