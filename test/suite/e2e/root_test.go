//go:build linux && amd64

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/demo"
	"github.com/keyagent/keyagent/internal/lab"
	"github.com/keyagent/keyagent/internal/lab/pki"
	"github.com/keyagent/keyagent/test/sim/seed"
)

// rootPackages are of the system whose root file system keyagent opens.
var rootPackages = []string{"initramfs-tools", "dracut-core", "dracut-network", "zstd", "cryptsetup", "cryptsetup-initramfs", "dmsetup", "procps"}

// silentAddress is a key service that accepts connections and says nothing.
const silentAddress = "10.0.2.103:8443"

// rootConfig is that of the agent, and with rootRetry that of the initrd.
const rootConfig = `servers:
  - address: ` + silentAddress + `
    name: keyservice.demo
    ca: ca.pem
  - address: ` + demo.KeyServiceAddress + `
    name: keyservice.demo
    ca: ca.pem
volumes:
  - {id: root, device: /dev/disk/by-id/virtio-data, format: true, filesystem: ext4, label: fresh}
`

// rootDisk is the size of the disk below it, in bytes.
const rootDisk = 640 << 20

// rootRetry has the console say soon that the key service does not answer.
const rootRetry = "retry: {budget: 15s}\n"

const rootCallers = `callers:
  - {uid: 0, operations: [open, close, status, list], volumes: ["*"]}
`

// seedScript fills a volume that was just created: a root file system comes from
// somewhere, and here it is the disk beside it.
const seedScript = `#!/bin/sh
case "$1" in prereqs) exit 0 ;; esac
[ "$(blkid -o value -s LABEL /dev/mapper/root)" != fresh ] || dd if=/dev/disk/by-id/virtio-root of=/dev/mapper/root bs=1M
`

// seedUnit runs it in an initrd of systemd, which waits for the volume by its unit.
const seedUnit = `[Unit]
DefaultDependencies=no
Requires=dev-mapper-root.device
After=dev-mapper-root.device
Before=systemd-fsck-root.service sysroot.mount
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/seed
`

// lateScript takes the disk and the TPM away before the initrd looks for them, where the
// command line says so, and gives the disk back after 90 seconds and the TPM a little later. Of
// the TPM it takes the nodes alone: a driver that is bound again calls it tpm1.
const lateScript = `#!/bin/sh
case "$1" in prereqs) echo udev; exit 0 ;; esac
grep -q bed.late /proc/cmdline || exit 0
for disk in /sys/block/vd*; do
	[ "$(cat "$disk/serial")" = data ] && disk=$(basename "$(readlink -f "$disk/device")") && break
done
echo "$disk" >/sys/bus/virtio/drivers/virtio_blk/unbind
mkdir /dev/held
mv /dev/tpm0 /dev/tpmrm0 /dev/held
[ -e /dev/tpm0 ] || [ -e /dev/disk/by-id/virtio-data ] || echo "E2E no TPM and no disk" >/dev/console
(
	sleep 90
	echo "E2E there is a disk" >/dev/console
	echo "$disk" >/sys/bus/virtio/drivers/virtio_blk/bind
	sleep 25
	echo "E2E there is a TPM" >/dev/console
	mv /dev/held/* /dev
) &
`

// rootScript is what the system does once it is up.
const rootScript = `
echo "E2E root $(findmnt -n -r -o SOURCE,FSTYPE /)"
echo "E2E agent $(systemctl is-active keyagent-agent.service) $(systemctl show keyagent-agent.service -P StatusText)"
keyagent status | sed 's/^/E2E status /'
journalctl -b -o cat --no-pager -u keyagent-agent.service
echo "E2E emergency $(systemctl is-active emergency.service) $(systemctl is-active rescue.service)"
ip -d link show | grep -o "vlan protocol 802.1Q id [0-9]*" | sed 's/^/E2E /'
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
	must(t, os.Truncate(s.disk, rootDisk))
	ca, err := os.ReadFile(s.service.CA())
	must(t, err)
	release := s.kernel.Release
	system := lab.System{
		Kernel: s.kernel, Packages: rootPackages, Script: rootScript,
		Files: []lab.File{
			{Path: "/keyagent.deb", Source: deb(t, "v0.1.0")},
			{Path: "/etc/keyagent/initrd.yaml", Data: []byte(rootConfig + rootRetry)},
			{Path: "/etc/keyagent/agent.yaml", Data: []byte(rootConfig + rootCallers)},
			{Path: "/etc/keyagent/ca.pem", Data: ca},
			{Path: "/etc/fstab", Data: []byte("/dev/mapper/root / ext4 noatime 0 1\n")},
			// Those that the hook names, and no others: an image is built on another machine.
			{Path: "/etc/initramfs-tools/conf.d/modules", Data: []byte("MODULES=list\nCOMPRESSLEVEL=3\n")},
			{Path: "/etc/initramfs-tools/scripts/local-premount/seed", Data: []byte(seedScript), Mode: 0o755},
			{Path: "/seed/usr/bin/seed", Data: []byte(seedScript), Mode: 0o755},
			{Path: "/seed/usr/lib/systemd/system/seed.service", Data: []byte(seedUnit)},
			{Path: "/etc/initramfs-tools/scripts/init-top/late", Data: []byte(lateScript), Mode: 0o755},
		},
		Setup: `
dpkg -i /keyagent.deb
rm /keyagent.deb
systemctl enable keyagent-agent.service
update-initramfs -c -k ` + release + `
mkdir -p /seed/usr/lib/systemd/system/initrd-root-fs.target.wants
ln -s ../seed.service /seed/usr/lib/systemd/system/initrd-root-fs.target.wants
dracut --quiet --force --no-hostonly --include /seed / --install "blkid dd" --compress "zstd -q -3 -T0" --omit "plymouth btrfs lvm mdraid dmraid multipath nfs iscsi qemu crypt network-legacy" /boot/dracut.img ` + release + `
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
func (s *rootSystem) accept(t testing.TB, name, initrd string, phases ...string) (esp string) {
	t.Helper()
	return s.acceptWith(t, name, initrd, "", phases...)
}

// acceptWith has more words on the command line.
func (s *rootSystem) acceptWith(t testing.TB, name, initrd, words string, phases ...string) (esp string) {
	t.Helper()
	s.initrd = filepath.Join(s.system.Boot, initrd)
	uki, esp := s.image2(t, name, words)
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
func (s *rootSystem) image2(t testing.TB, name, more string) (uki, esp string) {
	network := "ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:none"
	if strings.Contains(more, "ip=") {
		network = ""
	}
	return s.node.image(t, name, strings.Join(strings.Fields(lab.CommandLine("root=/dev/mapper/root", "rw", "systemd.gpt_auto=0", "nohibernate", network)+" "+more), " "))
}

// policy writes the policy, and starts the key service.
func (s *rootSystem) policy(t testing.TB, names ...string) {
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

// silent makes a server that the machine asks first and that says nothing.
func (s *rootSystem) silent(t testing.TB) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { listener.Close() })
	s.forward = append(s.forward, lab.Forward{Guest: silentAddress, Host: listener.Addr().String()})
}

// another gives the key service a certificate of another authority, until undone.
func (s *rootSystem) another(t testing.TB) (undo func()) {
	t.Helper()
	must(t, s.service.Stop())
	keep := map[string][]byte{}
	for _, name := range []string{"ca.pem", "server.pem", "server.key"} {
		data, err := os.ReadFile(s.path("service/" + name))
		must(t, err)
		keep[name] = data
	}
	ca, err := pki.NewAuthority()
	must(t, err)
	cert, err := ca.Server("keyservice.demo")
	must(t, err)
	must(t, ca.Write(s.path("service"), cert))
	must(t, s.service.Start(context.WithoutCancel(t.Context())))
	return func() {
		must(t, s.service.Stop())
		for name, data := range keep {
			must(t, os.WriteFile(s.path("service/"+name), data, 0o600))
		}
		must(t, s.service.Start(context.WithoutCancel(t.Context())))
	}
}

// A root file system is opened in the initrd of initramfs-tools and in that of dracut,
// and the agent of the real system takes it over. Who is refused stands outside, without
// a shell.
func TestARootFileSystemIsOpenedInTheInitrd(t *testing.T) {
	full := os.Getenv("KEYAGENT_BOOTS_FULL") != ""
	r := seed.Rand(t)
	s := newRootSystem(t)
	s.silent(t)
	phases := []string{"", "sysinit", "sysinit:ready"}
	classic := s.accept(t, "classic", "initrd.img-"+s.kernel.Release, phases...)
	late := s.acceptWith(t, "late", "initrd.img-"+s.kernel.Release, "bed.late vlan=eth0.10:eth0 ip=:::::eth0:dhcp", phases...)
	keyscript := s.accept(t, "keyscript", "keyscript.img", phases...)
	dracut := s.accept(t, "dracut", "dracut.img", "enter-initrd", "enter-initrd:leave-initrd:sysinit", "enter-initrd:leave-initrd:sysinit:ready")
	s.policy(t, "classic", "late", "dracut", "keyscript")

	// Of what is alike, one; all of it, and twice, where all is wanted. The first of each
	// row creates the volume.
	creates, rest := classic, []string{dracut, keyscript, late}
	if r.IntN(2) == 0 {
		creates, rest[0] = dracut, classic
	}
	rows := [][]string{{creates, rest[r.IntN(len(rest))]}}
	if full {
		rows = [][]string{{dracut}, {classic, dracut, keyscript, late, classic, dracut, keyscript}}
	}
	for i, row := range rows {
		if i > 0 {
			s.empty(t)
		}
		s.comesUp(t, row, late)
	}

	s.volumeKey(t, s.dek(t, "root")) // it is the key that consoles are searched for
	before := digest(t, s.disk)
	_, changed := s.image2(t, "changed", "init.debug")
	s.refused(t, changed, "evidence refused", "correlation id")
	bad := []func(){
		func() {
			s.clock = time.Now().AddDate(11, 0, 0)
			s.refused(t, classic, "server not trusted")
			s.clock = time.Time{}
		},
		func() {
			undo := s.another(t)
			s.refused(t, dracut, "server not trusted")
			undo()
		},
		func() {
			was := digest(t, s.disk)
			flip(t, s.disk, 0x1000+100, 0x5000+100)
			s.refused(t, dracut, "header refused", "correlation id")
			flip(t, s.disk, 0x1000+100, 0x5000+100)
			if digest(t, s.disk) != was {
				complain(t, "a header that is refused was changed")
			}
		},
	}
	r.Shuffle(len(bad), func(i, j int) { bad[i], bad[j] = bad[j], bad[i] })
	if !full {
		bad = bad[:1]
	}
	for _, b := range bad {
		b()
	}
	if digest(t, s.disk) != before {
		complain(t, "a machine that was refused has changed its disk")
	}
}

// comesUp boots the machine from each image in turn.
func (s *rootSystem) comesUp(t *testing.T, esps []string, late string) {
	t.Helper()
	for i, esp := range esps {
		down := i == 1 && esp != late // which waits for its disk first
		if down {
			must(t, s.service.Stop())
		}
		g := s.boot(t, esp, s.system.Image)
		if down {
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
		if esp == late {
			wantLines(t, g, "E2E vlan protocol 802.1Q id 10", "E2E no TPM and no disk", "E2E there is a TPM", "E2E there is a disk",
				"keyagent: attempt 1: not found", "no attestation device")
		}
		s.quiet(t, g)
		logTimeline(t, i+1, g)
	}
}

// empty gives the machine another disk, and the key service no memory of the one before.
func (s *rootSystem) empty(t *testing.T) {
	t.Helper()
	must(t, s.service.Stop())
	must(t, os.RemoveAll(s.path("service/records")))
	must(t, os.Truncate(s.disk, 0))
	must(t, os.Truncate(s.disk, rootDisk))
	must(t, s.service.Start(context.WithoutCancel(t.Context())))
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
		complain(t, "the guest ended with %d, %v", status, err)
	}
	wantLines(t, g, append(says, "reboot: Restarting system")...)
	if hasLine(g, "E2E root") {
		complain(t, "the system has started")
	}
	s.quiet(t, g)
}

// prompts are what a console says that waits for a person.
var prompts = []string{"enter passphrase", "please unlock disk", "give root password", "(initramfs)", "press enter", "emergency mode", "dracut:/#", "dropping to a shell", "login:", "sh: can't access tty"}

// quiet fails where the console, which is the host's, offers something or shows the key.
func (s *rootSystem) quiet(t *testing.T, g *lab.Guest) {
	t.Helper()
	quiet(t, g)
	for form, text := range textForms(s.dek(t, "root")) {
		if hasLine(g, string(text)) {
			complain(t, "the console shows the DEK (%s)", form)
		}
	}
}

// quiet fails where the console offers something.
func quiet(t *testing.T, g *lab.Guest) {
	t.Helper()
	for _, l := range g.Lines() {
		for _, p := range prompts {
			if strings.Contains(strings.ToLower(l.Text), p) {
				complain(t, "the console asks: %s", l.Text)
			}
		}
	}
}
