//go:build linux && amd64

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/demo"
	"github.com/keyagent/keyagent/internal/lab"
)

// tangAddress is where the guest finds the tang server.
const tangAddress = "10.0.2.102:80"

// benchConfig has keyagent begin its volume with the image that the other contestants
// copy themselves.
const benchConfig = `servers:
  - address: ` + demo.KeyServiceAddress + `
    name: keyservice.demo
    ca: ca.pem
volumes:
  - {id: root, device: /dev/disk/by-id/virtio-data, format: true, filesystem: ext4, from: {path: /dev/disk/by-id/virtio-root, sha256: %s}}
`

// boots makes three initrds that differ in how they open the root file system and in
// nothing else, and the disks for those that keyagent does not create. Keyslots have
// PBKDF2 at its least, as keyagent's: no contestant pays for a slow derivation.
const boots = `
rel=$1
cd /boot
dpkg -i /keyagent.deb
cp -a /usr/share/initramfs-tools /held
without() { find /usr/share/initramfs-tools -name "$1" -delete; }
without clevis
mkinitramfs -o keyagent.img $rel
without keyagent

mkdir /etc/keys
dd if=/dev/urandom of=/etc/keys/root.key bs=32 count=1 status=none
chmod -R go= /etc/keys
truncate -s 128M keyfile.disk
cryptsetup luksFormat --batch-mode --type luks2 --sector-size 4096 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 keyfile.disk /etc/keys/root.key
cp keyfile.disk clevis.disk
echo 'KEYFILE_PATTERN="/etc/keys/*.key"' >>/etc/cryptsetup-initramfs/conf-hook
echo 'root /dev/disk/by-id/virtio-data /etc/keys/root.key luks,initramfs' >/etc/crypttab
mkinitramfs -o keyfile.img $rel

cp -a /held/. /usr/share/initramfs-tools
without keyagent
mkdir tang
cp /usr/libexec/tangd $(ldd /usr/libexec/tangd | sed -n 's/.* => \(.*\) (.*/\1/p') tang
/usr/libexec/tangd-keygen tang
printf 'GET /adv HTTP/1.1\r\nHost: tang\r\n\r\n' | /usr/libexec/tangd /boot/tang | sed '1,/^.$/d' >/adv
clevis luks bind -y -k /etc/keys/root.key -d clevis.disk tang '{"url": "http://` + tangAddress + `", "adv": "/adv"}'
echo 'root /dev/disk/by-id/virtio-data none luks,initramfs' >/etc/crypttab
mkinitramfs -o clevis.img $rel
`

// benchInit is the whole system behind the initrd: what is measured is over by then.
const benchInit = `#!/bin/busybox sh
read -r uptime _ </proc/uptime
echo "KEYAGENT-MARK $uptime root"
echo "KEYAGENT-EXIT 0"
/bin/busybox sync
/bin/busybox poweroff -f
`

// benchSeed fills a disk that has no filesystem yet.
const benchSeed = `#!/bin/sh
case "$1" in prereqs) exit 0 ;; esac
blkid /dev/mapper/root || dd if=/dev/disk/by-id/virtio-root of=/dev/mapper/root bs=1M
`

const initrdMark = `#!/bin/sh
case "$1" in prereqs) exit 0 ;; esac
read -r uptime rest </proc/uptime
echo "KEYAGENT-MARK $uptime initrd" >/dev/console
`

// contestant is one way to open a root file system.
type contestant struct {
	name, initrd, esp, disk string
	times                   []time.Duration // from power on to the root file system
}

// BenchmarkBoot compares the time from power on to a root file system on LUKS2: opened by
// a key file in the initrd, by keyagent, and by clevis with tang; each with Debian's
// kernel, initramfs-tools and a static address, on the same machine. Turns are taken. It
// writes boot.svg into $KEYAGENT_BENCH_OUT, if that is set.
func BenchmarkBoot(b *testing.B) {
	tiny := tinyRoot(b)
	s := benchSystem(b, tiny)
	all := []*contestant{
		{name: "key file", initrd: "keyfile.img", disk: filepath.Join(s.system.Boot, "keyfile.disk")},
		{name: "keyagent", initrd: "keyagent.img", disk: s.disk},
		{name: "clevis and tang", initrd: "clevis.img", disk: filepath.Join(s.system.Boot, "clevis.disk")},
	}
	for _, c := range all {
		c.esp = s.accept(b, strings.ReplaceAll(c.name, " ", "-"), c.initrd, "")
	}
	s.policy(b, "keyagent")
	for _, c := range all { // the first boot of each fills its disk
		s.turn(b, c, tiny)
		c.times = nil
	}
	var lines []demo.Timeline
	for b.Loop() {
		lines = nil
		for _, c := range all {
			lines = append(lines, s.turn(b, c, tiny))
		}
	}
	// The shortest: all that a busy machine does is to make it longer.
	took := func(c *contestant) time.Duration { return slices.Min(c.times) }
	base, ours, clevis := took(all[0]), took(all[1])-took(all[0]), took(all[2])-took(all[0])
	b.ReportMetric(base.Seconds(), "keyfile-s")
	b.ReportMetric(ours.Seconds(), "keyagent-added-s")
	b.ReportMetric(clevis.Seconds(), "clevis-added-s")
	b.ReportMetric(ours.Seconds()/clevis.Seconds(), "keyagent/clevis")
	if dir := os.Getenv("KEYAGENT_BENCH_OUT"); dir != "" {
		var svg bytes.Buffer
		must(b, demo.SVG(&svg, "From power on to a root file system, under CPU emulation", lines))
		must(b, os.MkdirAll(dir, 0o755))
		must(b, os.WriteFile(filepath.Join(dir, "boot.svg"), svg.Bytes(), 0o644))
	}
}

func benchSystem(b *testing.B, tiny string) *rootSystem {
	s := &rootSystem{node: newMachine(b, false)}
	must(b, os.Truncate(s.disk, 128<<20))
	ca, err := os.ReadFile(s.service.CA())
	must(b, err)
	system := lab.System{
		Kernel:   s.kernel,
		Packages: []string{"initramfs-tools", "zstd", "cryptsetup", "cryptsetup-initramfs", "dmsetup", "procps", "clevis-initramfs", "tang-common"},
		Files: []lab.File{
			{Path: "/keyagent.deb", Source: packageOf(b, nodeProgram(b), "v0.1.0")},
			{Path: "/etc/keyagent/initrd.yaml", Data: []byte(fmt.Sprintf(benchConfig, digest(b, tiny)))},
			{Path: "/etc/keyagent/ca.pem", Data: ca},
			{Path: "/etc/fstab", Data: []byte("/dev/mapper/root / ext4 noatime 0 1\n")},
			{Path: "/etc/initramfs-tools/conf.d/modules", Data: []byte("MODULES=list\nCOMPRESSLEVEL=3\n")},
			{Path: "/etc/initramfs-tools/modules", Data: []byte("dm_mod\ndm_crypt\nxts\naesni_intel\nvirtio_pci\nvirtio_blk\nvirtio_net\next4\n")},
			{Path: "/etc/initramfs-tools/scripts/init-top/mark", Data: []byte(initrdMark), Mode: 0o755},
			{Path: "/etc/initramfs-tools/scripts/local-premount/seed", Data: []byte(benchSeed), Mode: 0o755},
		},
		Setup: "set -- " + s.kernel.Release + "\n" + boots,
	}
	s.system, err = system.Build(b.Context(), s.cache, s.path("system"), "700M")
	must(b, err)
	s.tang(b)
	return s
}

// nodeProgram builds the program for confidential VMs.
func nodeProgram(b *testing.B) string {
	b.Helper()
	out := filepath.Join(b.TempDir(), "keyagent")
	build := exec.CommandContext(b.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out,
		"-tags", "grpcnotrace,keyagent_node", "./cmd/keyagent")
	build.Dir = moduleRoot
	build.Env = append(os.Environ(), "GOEXPERIMENT=runtimesecret")
	if text, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, text)
	}
	return out
}

// tang answers on a port of this machine as the tang server whose keys the build made.
func (s *rootSystem) tang(b *testing.B) {
	dir := filepath.Join(s.system.Boot, "tang")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(b, err)
	s.forward = append(s.forward, lab.Forward{Guest: tangAddress, Host: listener.Addr().String()})
	b.Cleanup(func() { listener.Close() })
	ctx := context.WithoutCancel(b.Context())
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				cmd := exec.CommandContext(ctx, filepath.Join(dir, "tangd"), dir)
				cmd.Env = []string{"LD_LIBRARY_PATH=" + dir}
				// A pipe, so that the end of the guest's side does not end the answer.
				in, err := cmd.StdinPipe()
				if err != nil {
					return
				}
				cmd.Stdout = conn
				go func() { io.Copy(in, conn); in.Close() }()
				_ = cmd.Run()
			}()
		}
	}()
}

// tinyRoot makes a file system that ends the boot as soon as it is the root.
func tinyRoot(b *testing.B) string {
	dir := b.TempDir()
	for _, name := range []string{"bin", "sbin", "proc", "sys", "dev", "run"} {
		must(b, os.MkdirAll(filepath.Join(dir, "tree", name), 0o755))
	}
	busybox, err := exec.LookPath("busybox")
	must(b, err)
	program, err := os.ReadFile(busybox)
	must(b, err)
	must(b, os.WriteFile(filepath.Join(dir, "tree/bin/busybox"), program, 0o755))
	must(b, os.WriteFile(filepath.Join(dir, "tree/sbin/init"), []byte(benchInit), 0o755))
	out := filepath.Join(dir, "root.img")
	if text, err := exec.CommandContext(b.Context(), "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-m", "0", "-d", filepath.Join(dir, "tree"), out, "32M").CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, text)
	}
	return out
}

// turn boots a contestant once.
func (s *rootSystem) turn(b *testing.B, c *contestant, root string) demo.Timeline {
	b.Helper()
	s.disk = c.disk
	g := s.boot(b, c.esp, root)
	defer g.Close()
	wantStatus(b, g, 0)
	line := demo.Timeline{Title: c.name, Moments: []demo.Moment{{Name: "power on"}}}
	for _, m := range g.Marks() {
		line.Moments = append(line.Moments, demo.Moment{Name: m.Name, At: m.At})
	}
	if len(line.Moments) != 3 {
		b.Fatalf("%s: the marks are %v", c.name, g.Marks())
	}
	at := line.Moments[2].At
	c.times = append(c.times, at)
	line.Title = fmt.Sprintf("%s: %.1f s, %.1f s of them in the initrd", c.name, at.Seconds(), (at - line.Moments[1].At).Seconds())
	return line
}
