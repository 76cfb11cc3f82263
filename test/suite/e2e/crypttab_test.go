//go:build linux && amd64

package e2e

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/demo"
	"github.com/keyagent/keyagent/internal/lab"
	"github.com/keyagent/keyagent/test/sim/seed"
)

// crypttabScript is what the system does in each boot. When it finds what an earlier boot
// wrote, it is upgraded as well, while volumes are in use.
const crypttabScript = `
say() { echo "E2E $*"; }
state() { systemctl is-active "$@" | tr '\n' ' '; }
keyed=systemd-cryptsetup@keyed.service
mappings() { dmsetup ls | sort | tr '\n\t' '  '; }
journal() { journalctl -b -o cat --no-pager -u keyagent-agent.service -u keyagent-keys.socket -u systemd-cryptsetup@data.service -u systemd-cryptsetup@swap.service -u $keyed; }
leases() { # WHEN
	for i in $(seq 60); do
		[ "$(keyagent status | grep -c " held ")" = 2 ] && break
		sleep 0.5
	done
	keyagent status
	say "$1, $(keyagent status | grep -c " held ") leases are held"
}
note() { # FOLDER
	if [ -f "$1/hello" ]; then
		say "read $1: $(cat "$1/hello")"
	else
		echo "written by the first boot" >"$1/hello"
		say "wrote $1: $(cat "$1/hello")"
	fi
}
say "$(systemctl --version | sed -n 1p)"
while [ "$(systemctl is-active $keyed)" = activating ]; do sleep 0.5; done
say "unit $(systemctl show systemd-cryptsetup@data.service -P ExecMainStatus) $(systemctl show systemd-cryptsetup@data.service -P FragmentPath), agent $(systemctl show keyagent-agent.service -P ExecMainStatus)"
say "booted $(state keyagent-agent.service systemd-cryptsetup@data.service $keyed)"
say "emergency $(state emergency.service rescue.service)"
say "mappings $(mappings)"
say "asked for a passphrase: $(journalctl -b --no-pager | grep -c -i 'enter passphrase') times"
if ! systemctl is-active --quiet keyagent-agent.service; then
	journal
	exit 3
fi
first=
if ! systemctl is-active --quiet $keyed; then
	# A blank disk: systemd finds no header, and does not even ask.
	keyagent format data-keys && say "created by hand"
	systemctl reset-failed $keyed
	systemctl start srv-keyed.mount
	first=yes
fi
say "working $(state keyagent-agent.service systemd-cryptsetup@data.service systemd-cryptsetup@swap.service $keyed keyagent-keys.socket)"
say "data $(findmnt -n -r -o SOURCE,FSTYPE /srv/data)"
say "keyed $(findmnt -n -r -o SOURCE,FSTYPE /srv/keyed)"
say "scratch $(findmnt -n -r -o SOURCE,FSTYPE /scratch) has [$(ls -A /scratch)]"
[ "$(swapon --noheadings --raw --show=NAME)" = "$(readlink -f /dev/mapper/swap)" ] && say "swap is in use"
echo "of this boot" >/scratch/note
note /srv/data
note /srv/keyed
leases working
if [ "$first" ]; then
	journal
	exit 0
fi

# The package is upgraded, under load.
for at in data keyed; do (
	cd /srv/$at
	n=0
	until [ -e /run/enough ]; do
		sleep 0.5
		head -c 65536 /dev/urandom >new && sync new && mv new file && sha256sum file >sum && sha256sum --check --quiet sum || break
		n=$((n + 1))
	done
	[ -e /run/enough ] && [ $n -gt 0 ] && say "the writer of $at saw no error"
) & done
agent() { systemctl show -P MainPID keyagent-agent.service; }
mounts() { grep ' /srv/' /proc/self/mountinfo | cut -d' ' -f1-5; }
before="$(agent)" kept="$(mappings) $(mounts)"
dpkg -i /upgrade.deb
say "upgraded to $(dpkg-query -W -f '${Version}' keyagent): $(state keyagent-agent.service keyagent-keys.socket $keyed)"
[ "$(agent)" != "$before" ] && say "the agent is another process of $(readlink /proc/$(agent)/exe)"
[ "$(mappings) $(mounts)" = "$kept" ] && say "mappings and mounts are the same"
leases upgraded
touch /run/enough
wait
systemctl stop srv-keyed.mount $keyed
say "closed, which leaves $(mappings)"
systemctl start srv-keyed.mount
say "again $(cat /srv/keyed/hello), $(state keyagent-agent.service keyagent-keys.socket $keyed)"
systemctl daemon-reload
systemctl stop srv-data.mount systemd-cryptsetup@data.service
say "closed as well, which leaves $(mappings)"
systemctl start srv-data.mount
say "data again $(cat /srv/data/hello), $(state systemd-cryptsetup@data.service)"
leases again
journal
`

const crypttabConfig = `servers:
  - {address: "` + demo.KeyServiceAddress + `", name: keyservice.demo, ca: ca.pem}
callers:
  - {uid: 0, operations: [open, format, close, status, list], volumes: ["*"]}
crypttab: /etc/crypttab
volumes:
  - {id: data-keys, name: keyed, device: /dev/disk/by-id/virtio-data-part2, format: true, filesystem: ext4, no_mmp: true}
  - {id: scratch, kind: scratch, device: /dev/disk/by-id/virtio-data-part4, format: true, filesystem: ext4, no_mmp: true, mount: /scratch}
key_socket:
  path: /run/keyagent/keys.sock
  consumers:
    - {volume: data-keys, unit: systemd-cryptsetup@keyed.service}
`

const crypttabLines = `data  /dev/disk/by-id/virtio-data-part1 none keyagent,keyagent-format=ext4,keyagent-no-mmp,_netdev
keyed /dev/disk/by-id/virtio-data-part2 /run/keyagent/keys.sock luks,_netdev,headless=true
swap  /dev/disk/by-id/virtio-data-part3 none keyagent,swap,_netdev
`

const crypttabFstab = `/dev/mapper/data  /srv/data  ext4 _netdev,nofail 0 2
/dev/mapper/keyed /srv/keyed ext4 _netdev,nofail 0 2
`

// crypttabSystem makes the root file system: a whole Debian with our package in it.
func crypttabSystem(t *testing.T, n *node, release string) *lab.Built {
	t.Helper()
	ca, err := os.ReadFile(n.service.CA())
	must(t, err)
	built, err := lab.System{
		Kernel: n.kernel, Release: release, Script: crypttabScript,
		Files: []lab.File{
			{Path: "/keyagent.deb", Source: deb(t, "v0.1.0")},
			{Path: "/upgrade.deb", Source: deb(t, "v0.2.0")},
			{Path: "/etc/keyagent/agent.yaml", Data: []byte(crypttabConfig), Mode: 0o600},
			{Path: "/etc/keyagent/ca.pem", Data: ca},
			{Path: "/etc/crypttab", Data: []byte(crypttabLines)},
			{Path: "/etc/fstab", Data: []byte(crypttabFstab)},
			{Path: "/etc/systemd/system/systemd-cryptsetup@keyed.service.d/keyagent.conf", Data: []byte("[Service]\nExecStartPost=/usr/bin/keyagent unlock --need-agent data-keys\n")},
			{Path: "/srv/data/.not-mounted", Data: []byte("\n")},
			{Path: "/srv/keyed/.not-mounted", Data: []byte("\n")},
		},
		Setup: `
dpkg -i /keyagent.deb
rm /keyagent.deb
systemctl enable keyagent-keys.socket
systemd-analyze verify --man=no keyagent-agent.service keyagent-keys.socket keyagent-serve.service keyagent-kubekms.service keyagent-csi-proxy.service keyagent-initrd.service
rm -r /boot/*
`,
	}.Build(t.Context(), n.cache, n.path("system"), "700M")
	must(t, err)
	return built
}

// Debian 12 and the newest systemd open disks in both forms of crypttab, installed from
// our package, which is upgraded meanwhile. What a shutdown closes it gives back; one word
// more on the kernel command line, and nothing is open.
func TestCrypttabOpensItsDisks(t *testing.T) {
	releases := []string{"", newest}
	if os.Getenv("KEYAGENT_BOOTS_FULL") == "" {
		n := seed.Rand(t).IntN(len(releases))
		releases = releases[n : n+1]
	}
	for _, release := range releases {
		t.Run(cmp.Or(release, "bookworm"), func(t *testing.T) { opensItsDisks(t, release) })
	}
}

func opensItsDisks(t *testing.T, release string) {
	n := newMachine(t, false)
	n.limit = 8 * time.Minute
	partition(t, n, 4)
	if release == newest {
		n.newestStub(t)
	}
	n.expect(t, commandLine("crypttab"))
	n.start(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(strings.Join(n.service.Log(), "\n"))
		}
	})
	esp, system := n.path("expected.esp"), crypttabSystem(t, n, release)
	var released int
	for i, verb := range []string{"wrote", "read"} {
		g := n.boot(t, esp, system.Image)
		wantStatus(t, g, 0)
		if t.Failed() {
			t.FailNow()
		}
		isOf(t, release, g)
		for _, at := range []string{"data", "keyed"} {
			wantLines(t, g, "E2E "+verb+" /srv/"+at+": written by the first boot", "E2E "+at+" /dev/mapper/"+at+" ext4")
		}
		// What was in the scratch volume is gone with the boot before.
		wantLines(t, g, "E2E working active active active active active", "E2E scratch /dev/mapper/scratch ext4 has [lost+found]", "E2E swap is in use", "E2E working, 2 leases are held",
			"E2E unit 0 /run/systemd/generator.early/systemd-cryptsetup@data.service, agent 0",
			"E2E emergency inactive inactive", "E2E asked for a passphrase: 0 times")
		released += 2
		if i == 0 {
			wantLines(t, g, "E2E booted active active failed", "E2E created by hand")
		} else {
			wantLines(t, g, "E2E booted active active active", "E2E the writer of data saw no error", "E2E the writer of keyed saw no error",
				"E2E upgraded to 0.2.0: active active active", "E2E the agent is another process of /usr/bin/keyagent", "E2E mappings and mounts are the same", "E2E upgraded, 2 leases are held",
				"E2E closed, which leaves data (253:", "E2E again written by the first boot, active active active",
				"E2E closed as well, which leaves keyed (253:", "E2E data again written by the first boot, active", "E2E again, 2 leases are held")
			if hasLine(g, `"step":"formatted"`) {
				complain(t, "the second boot has formatted")
			}
			released += 2 // by the administrator
		}
		quiet(t, g)
		logTimeline(t, i+1, g)
		log, err := os.ReadFile(n.service.AuditLog())
		must(t, err)
		if got := bytes.Count(log, []byte(`"release-lease"`)); got != released {
			complain(t, "boot %d: leases were given back %d times in all, want %d", i+1, got, released)
		}
		n.nothingIsHeld(t)
	}

	before := n.parts(t)
	_, changed := n.image(t, "changed", commandLine("crypttab", "init.debug"))
	g := n.boot(t, changed, system.Image)
	wantStatus(t, g, 3)
	// Swap and scratch have keys of their own, which nobody is asked for.
	wantLines(t, g, "E2E unit 4 ", "service, agent 6", "E2E booted failed", "E2E mappings scratch (253:", "evidence refused", "E2E emergency inactive inactive", "E2E asked for a passphrase: 0 times")
	quiet(t, g)
	if hasLine(g, "E2E mappings data") || hasLine(g, "E2E mappings keyed") {
		complain(t, "a volume is open")
	}
	if after := n.parts(t); after[0] != before[0] || after[1] != before[1] {
		complain(t, "the refused machine has changed its volumes")
	}
	logTimeline(t, 3, g)
}

// isOf asserts that the systemd is the release's.
func isOf(t *testing.T, release string, g *lab.Guest) {
	t.Helper()
	for _, l := range g.Lines() {
		var version int
		if _, err := fmt.Sscanf(l.Text, "E2E systemd %d", &version); err == nil {
			t.Logf("systemd %d", version)
			if old := version == 252; old != (release == "") || !old && version < 257 {
				complain(t, "it is another one")
			}
			return
		}
	}
	complain(t, "the guest did not print systemd's version")
}

// newestStub has the machine start from images with the newest stub, if that is a known
// one.
func (n *node) newestStub(t *testing.T) {
	t.Helper()
	p := &chainParts{cache: n.cache}
	n.stub = p.program(t, newest, "stub")
	uki := n.path("probe.efi")
	must(t, lab.UKI{Kernel: n.kernel, Initrd: n.kernel.Image, Stub: n.stub, Command: "probe"}.Build(t.Context(), uki))
	if _, err := n.service.Run(t.Context(), "measure", "--uki", uki, "--pcrs", "11"); err != nil {
		if !strings.Contains(err.Error(), "is not known") {
			t.Fatal(err)
		}
		t.Log(err)
		n.stub = ""
	}
}

// nothingIsHeld asserts that the key service knows two volumes, and no node that may write
// them.
func (n *node) nothingIsHeld(t *testing.T) {
	t.Helper()
	text, err := n.service.Run(t.Context(), "volume", "list", "--admin", n.path("service/admin.sock"), "--output", "json")
	must(t, err)
	var all []struct {
		Volume string
		Lease  any
	}
	must(t, json.Unmarshal(text, &all))
	if len(all) != 2 || all[0].Lease != nil || all[1].Lease != nil {
		complain(t, "after power off: %+v", all)
	}
}

// parts are the digests of the disk's partitions.
func (n *node) parts(t *testing.T) (all []string) {
	t.Helper()
	disk, err := os.ReadFile(n.disk)
	must(t, err)
	for part := range slices.Chunk(disk[partStart:], partSize) {
		sum := sha256.Sum256(part)
		all = append(all, hex.EncodeToString(sum[:]))
	}
	return all
}
