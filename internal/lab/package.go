package lab

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// listAge is how old the package lists of another release may be.
const listAge = 24 * time.Hour

// Package downloads a package of a Debian release, from the mirror that this
// machine has Debian from, and returns the folder that it is unpacked in, and
// its version. Nothing of it is installed. It serves what this machine's own
// release does not have, such as newer boot loaders.
func (c *Cache) Package(ctx context.Context, release, name string) (dir, version string, err error) {
	apt, version, err := c.find(ctx, release, name)
	if err != nil {
		return "", "", err
	}
	dir, err = c.entry(ctx, "package", []string{name, version}, func(dir string) error {
		inv := apt
		inv.dir = dir
		if _, err := inv.run(ctx, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name); err != nil {
			return err
		}
		return unpack(ctx, dir)
	})
	if err != nil {
		return "", "", fmt.Errorf("package %s of %s: %w", name, release, err)
	}
	return dir, version, nil
}

// find returns the version of a package in a release, and an apt that knows the release.
func (c *Cache) find(ctx context.Context, release, name string) (apt invocation, version string, err error) {
	apt, err = c.apt(ctx, release)
	if err != nil {
		return apt, "", fmt.Errorf("package lists of %s: %w", release, err)
	}
	out, err := apt.run(ctx, "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return apt, "", fmt.Errorf("find %s in %s: %w", name, release, err)
	}
	scan := bufio.NewScanner(bytes.NewReader(out))
	for scan.Scan() {
		if v, ok := strings.CutPrefix(scan.Text(), "Version: "); ok {
			version = v
		}
	}
	if version == "" {
		return apt, "", fmt.Errorf("%s has no package %s", release, name)
	}
	return apt, version, nil
}

// sourceLine is a release in the form of sources.list(5).
func sourceLine(mirror, release string) string {
	return fmt.Sprintf("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main", mirror, release)
}

// apt returns an invocation whose apt knows one release and nothing of this
// machine: its configuration, lists and archives are in the cache.
func (c *Cache) apt(ctx context.Context, release string) (invocation, error) {
	state := filepath.Join(c.dir, "apt-"+release)
	unlock, err := lock(ctx, state+".lock")
	if err != nil {
		return invocation{}, err
	}
	defer unlock()
	for _, dir := range []string{"lists/partial", "archives/partial", "etc"} {
		if err := os.MkdirAll(filepath.Join(state, dir), 0o755); err != nil {
			return invocation{}, err
		}
	}
	conf := filepath.Join(state, "etc/apt.conf")
	inv := invocation{env: []string{"APT_CONFIG=" + conf}}
	stamp := filepath.Join(state, "updated")
	if info, err := os.Stat(stamp); err == nil && time.Since(info.ModTime()) < listAge {
		return inv, nil
	}
	mirror, err := debianMirror(ctx)
	if err != nil {
		return invocation{}, err
	}
	source := sourceLine(mirror, release) + "\n"
	if err := os.WriteFile(filepath.Join(state, "etc/sources.list"), []byte(source), 0o644); err != nil {
		return invocation{}, err
	}
	text := fmt.Sprintf(`Dir::Etc::sourcelist %q;
Dir::Etc::sourceparts "-";
Dir::State::lists %q;
Dir::Cache %q;
Acquire::Languages "none";
APT::Sandbox::User "root";
`, filepath.Join(state, "etc/sources.list"), filepath.Join(state, "lists"), state)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return invocation{}, err
	}
	if _, err := inv.run(ctx, "apt-get", "-q", "update"); err != nil {
		return invocation{}, err
	}
	return inv, writeFile(stamp, nil)
}

// debianMirror returns where this machine gets its own release from.
func debianMirror(ctx context.Context) (string, error) {
	out, err := run(ctx, "apt-get", "indextargets", "--format", "$(CODENAME) $(SITE)", "Created-By: Packages", "Component: main")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(out)) {
		if name, site, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name == "bookworm" {
			return site, nil
		}
	}
	return "", fmt.Errorf("apt knows no mirror of bookworm; run: make deps")
}

// unpack unpacks the one package file in dir, and removes it.
func unpack(ctx context.Context, dir string) error {
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("expected one package file, found %q", debs)
	}
	if _, err := run(ctx, "dpkg", "-x", debs[0], dir); err != nil {
		return err
	}
	return os.Remove(debs[0])
}
