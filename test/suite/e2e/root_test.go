//go:build linux && amd64

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/demo"
	"github.com/keyagent/keyagent/internal/lab"
)

// rootPackages are of the system whose root file system keyagent opens.
var rootPackages = []string{"initramfs-tools", "dracut-core", "dracut-network", "zstd", "cryptsetup", "cryptsetup-initramfs", "dmsetup", "procps"}

// rootConfig is that of the initrd, and with callers that of the agent.
const rootConfig = `servers:
  - address: ` + demo.KeyServiceAddress + `
    name: keyservice.demo
    ca: ca.pem
retry: {budget: 15s}
volumes:
  - {id: root, device: /dev/disk/by-id/virtio-data, format: true}
`

const rootCallers = `callers:
  - {uid: 0, operations: [open, close, status, list], volumes: ["*"]}
`

// seedScript fills a volume that was just created: a root file system comes from
// somewhere, and here it is the disk beside it.
const seedScript = `#!/bin/sh
case "$1" in prereqs) exit 0 ;; esac
[ "$(blkid -o value -s TYPE /dev/mapper/root)" = ext4 ] || dd if=/dev/disk/by-id/virtio-root of=/dev/mapper/root bs=1M
`

// rootScript is what the system does once it is up.
const rootScript = `
echo "E2E root $(findmnt -n -r -o SOURCE,FSTYPE /)"
echo "E2E agent $(systemctl is-active keyagent-agent.service) $(systemctl show keyagent-agent.service -P StatusText)"
keyagent status | sed 's/^/E2E status /'
journalctl -b -o cat --no-pager -u keyagent-agent.service
echo "E2E emergency $(systemctl is-active emergency.service) $(systemctl is-active rescue.service)"
echo "E2E read: $(cat /var/lib/hello 2>/dev/null || echo nothing)"
number=$(sed -n 's/boot //p' /var/lib/hello 2>/dev/null)
echo "boot $((number + 1))" >/var/lib/hello
`

// rootSystem is a machine that starts from an encrypted root file system.
type rootSystem struct {
	*node
	system   *lab.Built
	profiles []string
}

func newRootSystem(t *testing.T) *rootSystem {
	t.Helper()
	s := &rootSystem{node: newMachine(t, true)}
	s.limit = 8 * time.Minute
	must(t, os.Truncate(s.disk, 640<<20))
	ca, err := os.ReadFile(s.service.CA())
	must(t, err)
	release := s.kernel.Release
	system := lab.System{
		Kernel: s.kernel, Packages: rootPackages, Script: rootScript,
		Files: []lab.File{
			{Path: "/keyagent.deb", Source: deb(t, "v0.1.0")},
			{Path: "/etc/keyagent/initrd.yaml", Data: []byte(rootConfig)},
			{Path: "/etc/keyagent/agent.yaml", Data: []byte(rootConfig + rootCallers)},
			{Path: "/etc/keyagent/ca.pem", Data: ca},
			{Path: "/etc/fstab", Data: []byte("/dev/mapper/root / ext4 noatime 0 1\n")},
			// Those that the hook names, and no others: an image is built on another machine.
			{Path: "/etc/initramfs-tools/conf.d/modules", Data: []byte("MODULES=list\nCOMPRESSLEVEL=3\n")},
			{Path: "/etc/initramfs-tools/scripts/local-premount/seed", Data: []byte(seedScript), Mode: 0o755},
		},
		Setup: `
dpkg -i /keyagent.deb
rm /keyagent.deb
systemctl enable keyagent-agent.service
update-initramfs -c -k ` + release + `
dracut --quiet --force --no-hostonly --compress "zstd -q -3 -T0" --omit "plymouth btrfs lvm mdraid dmraid multipath nfs iscsi qemu crypt network-legacy" /boot/dracut.img ` + release + `
# An initrd that opens the volume itself, with our key.
cp /etc/keyagent/initrd.yaml /initrd.yaml
sed -i 's/format: true/on_request: true/' /etc/keyagent/initrd.yaml
echo 'root /dev/disk/by-id/virtio-data none luks,initramfs,keyscript=/usr/lib/keyagent/keyscript' >/etc/crypttab
mkinitramfs -o /boot/keyscript.img ` + release + `
mv /initrd.yaml /etc/keyagent/initrd.yaml
rm /etc/crypttab
`,
	}
	s.system, err = system.Build(t.Context(), s.cache, s.path("system"), "500M")
	must(t, err)
	return s
}

// accept makes a disk to start from, which the policy accepts from then on, in the boot
// phases that are given.
func (s *rootSystem) accept(t *testing.T, name, initrd string, phases ...string) (esp string) {
	t.Helper()
	s.initrd = filepath.Join(s.system.Boot, initrd)
	uki, esp := s.image2(t, name, "")
	args := []string{"measure", "--name", name, "--trust", "root:demo", "--uki", uki, "--event-log", "trusted.log", "--pcrs", "0,1,2,3,4,5,6,7,11"}
	for _, p := range phases {
		args = append(args, "--phase", p)
	}
	profile, err := s.service.Run(t.Context(), args...)
	must(t, err)
	s.profiles = append(s.profiles, string(profile))
	return esp
}

// image2 makes what the machine starts from, with more words on the command line.
func (s *rootSystem) image2(t *testing.T, name, more string) (uki, esp string) {
	return s.node.image(t, name, strings.TrimSpace(lab.CommandLine("root=/dev/mapper/root", "rw", "systemd.gpt_auto=0", "nohibernate", "ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:none")+" "+more))
}

// policy writes the policy, and starts the key service.
func (s *rootSystem) policy(t *testing.T, names ...string) {
	t.Helper()
	var b bytes.Buffer
	fmt.Fprintf(&b, `version: 2
lifetime: 1h
trust:
  tpm:
    roots:
      - {name: demo, file: tpm-maker.pem}
grants:
  - name: root
    profiles: [%s]
    volumes: ["root"]
    operations: [open, format]
profiles:
`, strings.Join(names, ", "))
	for _, p := range s.profiles {
		for line := range strings.Lines(p) {
			if !strings.HasPrefix(line, "#") {
				b.WriteString("  " + line)
			}
		}
	}
	b.WriteString("...\n")
	must(t, os.WriteFile(s.path("service/policy.yaml"), b.Bytes(), 0o644))
	s.node.start(t)
	// A restart listens where the machine looks for it.
	config, err := os.ReadFile(s.path("service/serve.yaml"))
	must(t, err)
	must(t, os.WriteFile(s.path("service/serve.yaml"), bytes.Replace(config, []byte("127.0.0.1:0"), []byte(s.service.Address), 1), 0o600))
}

// A root file system is opened in the initrd of initramfs-tools and in that of dracut,
// and the agent of the real system takes it over. Who is refused stands outside, without
// a shell.
func TestARootFileSystemIsOpenedInTheInitrd(t *testing.T) {
	s := newRootSystem(t)
	classic := s.accept(t, "classic", "initrd.img-"+s.kernel.Release, "", "sysinit", "sysinit:ready")
	keyscript := s.accept(t, "keyscript", "keyscript.img", "", "sysinit", "sysinit:ready")
	dracut := s.accept(t, "dracut", "dracut.img", "enter-initrd", "enter-initrd:leave-initrd:sysinit", "enter-initrd:leave-initrd:sysinit:ready")
	s.policy(t, "classic", "dracut", "keyscript")

	good := []string{classic, dracut, keyscript}
	if os.Getenv("KEYAGENT_BOOTS_FULL") != "" {
		good = append(good, classic, dracut, keyscript)
	}
	for i, esp := range good {
		if i == 1 {
			must(t, s.service.Stop())
		}
		g := s.boot(t, esp, s.system.Image)
		if i == 1 {
			// A key service that is down is waited for, and the machine starts without
			// being switched on again.
			_, err := g.WaitLine(t.Context(), "keyagent: attempt 1: service unreachable")
			must(t, err)
			must(t, s.service.Start(context.WithoutCancel(t.Context())))
		}
		if _, err := g.Wait(t.Context()); err != nil {
			t.Log(strings.Join(s.service.Log(), "\n"))
		}
		wantStatus(t, g, 0)
		wantLines(t, g, "E2E root /dev/mapper/root ext4", "E2E agent active", "took over a mapping from the initrd", "E2E emergency inactive inactive")
		if i == 0 {
			wantLines(t, g, "E2E read: nothing")
		} else {
			wantLines(t, g, fmt.Sprintf("E2E read: boot %d", i))
		}
		quiet(t, g)
		logTimeline(t, i+1, g)
	}

	before := digest(t, s.disk)
	_, changed := s.image2(t, "changed", "init.debug")
	s.refused(t, changed, "evidence refused", "correlation id")
	s.clock = time.Now().AddDate(11, 0, 0)
	s.refused(t, classic, "server not trusted")
	s.clock = time.Time{}
	if digest(t, s.disk) != before {
		t.Error("a machine that was refused has changed its disk")
	}
	flip(t, s.disk, 0x1000+100, 0x5000+100)
	s.refused(t, dracut, "header refused", "correlation id")
}

// flip changes a byte at each offset.
func flip(t *testing.T, path string, offsets ...int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	for _, at := range offsets {
		var b [1]byte
		_, err := f.ReadAt(b[:], at)
		must(t, err)
		_, err = f.WriteAt([]byte{b[0] ^ 1}, at)
		must(t, err)
	}
}

// refused boots a machine that must not get beyond its initrd.
func (s *rootSystem) refused(t *testing.T, esp string, says ...string) {
	t.Helper()
	g := s.boot(t, esp, s.system.Image)
	if status, err := g.Wait(t.Context()); !errors.Is(err, lab.ErrDied) {
		t.Errorf("the guest ended with %d, %v", status, err)
	}
	wantLines(t, g, append(says, "reboot: Restarting system")...)
	if hasLine(g, "E2E root") {
		t.Error("the system has started")
	}
	quiet(t, g)
}

// prompts are what a console says that waits for a person.
var prompts = []string{"enter passphrase", "please unlock disk", "give root password", "(initramfs)", "press enter", "emergency mode", "dracut:/#", "dropping to a shell", "login:", "sh: can't access tty"}

// quiet fails where the console, which is the host's, offers something.
func quiet(t *testing.T, g *lab.Guest) {
	t.Helper()
	for _, l := range g.Lines() {
		for _, p := range prompts {
			if strings.Contains(strings.ToLower(l.Text), p) {
				t.Errorf("the console asks: %s", l.Text)
			}
		}
	}
}
