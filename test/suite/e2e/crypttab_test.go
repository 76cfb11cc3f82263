//go:build linux && amd64

package e2e

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/demo"
	"github.com/keyagent/keyagent/internal/lab"
)

// crypttabScript is what the node of a crypttab does once it is up. It closes the volume
// and starts the mount again, as an administrator would.
const crypttabScript = `
systemctl show systemd-cryptsetup@data.service -p ActiveState -p Result -p ExecMainStatus -p FragmentPath | sed 's/^/E2E unit /'
echo "E2E agent $(systemctl show keyagent-agent.service -P ExecMainStatus)"
echo "E2E emergency $(systemctl is-active emergency.service) $(systemctl is-active rescue.service)"
echo "E2E targets $(systemctl is-active cryptsetup.target remote-cryptsetup.target remote-fs.target | tr '\n' ' ')"
echo "E2E mappings $(dmsetup ls | tr '\n\t' '  ')"
echo "E2E findmnt $(findmnt -n -r -o SOURCE,FSTYPE /srv/data)"
echo "E2E asked for a passphrase: $(journalctl -b --no-pager | grep -c -i -e 'passphrase' -e 'systemd-cryptsetup\[') times"
journalctl -b -o cat --no-pager -u keyagent-agent.service -u systemd-cryptsetup@data.service
if mountpoint -q /srv/data; then
	if [ -f /srv/data/hello ]; then
		echo "E2E read: $(cat /srv/data/hello)"
	else
		echo "written by the first boot" >/srv/data/hello
		echo "E2E wrote: $(cat /srv/data/hello)"
	fi
	systemctl daemon-reload
	systemctl stop srv-data.mount systemd-cryptsetup@data.service
	echo "E2E stopped: $(systemctl is-active srv-data.mount | head -1), $(dmsetup ls | tr '\n\t' '  ')"
	systemctl start srv-data.mount
	echo "E2E again: $(cat /srv/data/hello)"
	keyagent status
else
	exit 3
fi
`

// crypttabFiles are those of a node whose volume is a line of crypttab.
func crypttabFiles(t *testing.T, n *node) []lab.File {
	t.Helper()
	files, err := demo.AgentFiles(n.service.CA())
	must(t, err)
	config, _, found := bytes.Cut(files[0].Data, []byte("volumes:\n"))
	if !found {
		t.Fatalf("the demo's configuration is another: %s", files[0].Data)
	}
	files[0].Data = append(bytes.Clone(config), "crypttab: /etc/crypttab\n"...)
	return append(files,
		lab.File{Path: "/usr/lib/systemd/system-generators/keyagent-generator", Link: "/usr/bin/keyagent"},
		lab.File{Path: "/etc/crypttab", Data: []byte("data /dev/disk/by-id/virtio-data none keyagent,keyagent-format=ext4,keyagent-no-mmp,_netdev\n")},
		lab.File{Path: "/etc/fstab", Data: []byte("/dev/mapper/data /srv/data ext4 _netdev,x-systemd.makefs=no 0 2\n")},
		lab.File{Path: "/srv/data/.not-mounted", Data: []byte("\n")})
}

// A line of crypttab and one of fstab are a volume: created, found again, and refused
// with one word more on the kernel command line, when nobody asks for a passphrase.
func TestALineOfCrypttabOpensItsDisk(t *testing.T) {
	n := newNode(t, commandLine("crypttab"))
	esp := n.path("expected.esp")
	for i, line := range []string{"E2E wrote: written by the first boot", "E2E read: written by the first boot"} {
		g := n.boot(t, esp, n.root(t, crypttabScript, crypttabFiles(t, n)...))
		wantStatus(t, g, 0)
		wantLines(t, g, line, "E2E unit ActiveState=active", "E2E unit Result=success", "E2E unit FragmentPath=/run/systemd/generator.early/systemd-cryptsetup@data.service",
			"E2E findmnt /dev/mapper/data ext4", "E2E stopped: inactive, No devices found", "E2E again: written by the first boot",
			"E2E asked for a passphrase: 0 times", "E2E emergency inactive inactive")
		if formatted := hasLine(g, `"step":"formatted"`); formatted != (i == 0) {
			t.Errorf("boot %d: formatted: %v", i+1, formatted)
		}
		// Once by the administrator, and once by the shutdown: the mount goes before the
		// mapping, which gives the lease back.
		log, err := os.ReadFile(n.service.AuditLog())
		must(t, err)
		if got := bytes.Count(log, []byte(`"release-lease"`)); got != 2*(i+1) {
			t.Errorf("boot %d: the lease was given back %d times in all", i+1, got)
		}
		logTimeline(t, i+1, g)
	}
	before := digest(t, n.disk)
	_, changed := n.image(t, "changed", commandLine("crypttab", "init.debug"))
	g := n.boot(t, changed, n.root(t, crypttabScript, crypttabFiles(t, n)...))
	wantStatus(t, g, 3)
	wantLines(t, g, "E2E agent 6", "E2E unit ExecMainStatus=4", "E2E emergency inactive inactive",
		"E2E mappings No devices found", "E2E asked for a passphrase: 0 times", "evidence refused")
	if after := digest(t, n.disk); after != before {
		t.Error("the refused node has changed its disk")
	}
	for _, l := range g.Lines() {
		if strings.Contains(strings.ToLower(l.Text), "enter passphrase") || strings.Contains(l.Text, "Give root password") {
			t.Errorf("the console asks: %s", l.Text)
		}
	}
}
