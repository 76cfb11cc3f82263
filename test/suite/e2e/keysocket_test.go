//go:build linux && amd64

package e2e

import (
	"bytes"
	"encoding/binary"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/demo"
	"github.com/keyagent/keyagent/internal/lab"
)

// keySocketScript is what the node does whose volumes systemd maps: one that a line of
// crypttab gives the socket for, one with the socket where systemd looks by itself, and
// one whose key is a service's credential.
const keySocketScript = `
await() { # STATE VOLUME...
	for i in $(seq 60); do
		now=$(keyagent status --output json | tr -d ' \n')
		left=
		for v in "$@"; do
			[ "$v" = "$1" ] || echo "$now" | grep -q "\"id\":\"$v\",[^}]*\"state\":\"$1\"" || left=1
		done
		[ "$left" ] || { echo "E2E $@"; return; }
		sleep 0.5
	done
	keyagent status
}
show() { echo "E2E $1: $(systemctl is-active systemd-cryptsetup@data.service 'systemd-cryptsetup@data\x2ddrop.service' keyagent-keys.socket keyagent-agent.service | tr '\n' ' ')"; }
note() { # FOLDER
	if [ -f "$1/hello" ]; then
		echo "E2E read $1: $(cat "$1/hello")"
	else
		echo "written by the first boot" >"$1/hello"
		echo "E2E wrote $1: $(cat "$1/hello")"
	fi
}
for unit in systemd-cryptsetup@data.service 'systemd-cryptsetup@data\x2ddrop.service'; do
	while [ "$(systemctl is-active "$unit")" = activating ]; do sleep 0.5; done
done
show booted
if ! systemctl is-active --quiet systemd-cryptsetup@data.service; then
	# A blank disk: systemd finds no header, and does not even ask.
	keyagent format data && echo "E2E created by hand"
	systemctl reset-failed
	systemctl start srv-data.mount && echo "E2E was mapped already"
fi
systemctl start vault.service
show working
note /srv/data
note /srv/drop
note /srv/vault
await open data data-drop data-cred

# An administrator closes them, and the agent gives the leases back.
systemctl stop srv-data.mount systemd-cryptsetup@data.service vault.service
await absent data data-cred
echo "E2E mappings $(dmsetup ls | tr '\n\t' '  ')"

# Nobody else gets a key.
sock=/run/keyagent/keys.sock
echo "E2E forged by the shell: $(forge beef/cryptsetup/data $sock 2>&1)"
echo "E2E forged by another user: $(setpriv --reuid=65534 --regid=65534 --clear-groups forge beef/cryptsetup/data $sock 2>&1)"
as() { unit=$1; shift; systemd-run --quiet --wait --pipe --collect --unit="$unit" "$@" 2>&1; }
echo "E2E forged by another unit: $(as other.service forge beef/cryptsetup/data $sock)"
echo "E2E forged by the unit of another volume: $(as systemd-cryptsetup@more.service forge beef/cryptsetup/data $sock)"
echo "E2E forged by a unit that has a credential: $(as thief.service forge beef/cryptsetup/data $sock)"
echo "E2E forged for a credential that it has not: $(as thief.service forge beef/unit/vault.service/vault-key $sock)"
echo "E2E forged by root of a user namespace: $(as thief.service unshare --user --map-root-user forge beef/unit/thief.service/vault-key $sock)"
echo "E2E forged as tpm2: $(forge beef/cryptsetup-tpm2/data $sock)"
echo "E2E forged by a unit that loads it: $(as other.service -p LoadCredential=vault-key:$sock wc -c /run/credentials/other.service/vault-key)"
echo "E2E mappings $(dmsetup ls | tr '\n\t' '  ')"

systemctl start srv-data.mount vault.service || journalctl -b -o cat --no-pager -u vault.service
echo "E2E again: $(cat /srv/data/hello), $(cat /srv/vault/hello)"
show again
# The agent is stopped while volumes are open, and takes them up.
systemctl restart keyagent-agent.service
await open data data-drop data-cred
systemd-analyze verify --man=no keyagent-keys.socket && echo "E2E verified keys"
journalctl -b -o cat --no-pager -u keyagent-agent.service -u systemd-cryptsetup@data.service -u 'systemd-cryptsetup@data\x2ddrop.service' -u vault.service -u keyagent-keys.socket
echo "E2E asked for a passphrase: $(journalctl -b --no-pager | grep -c -i 'enter passphrase') times"
`

// forge calls a socket from an abstract name of its own choice, and says how much it got.
const forge = `#!/usr/bin/perl
use strict; use Socket;
my ($name, $path) = @ARGV;
socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die "socket: $!";
bind($s, pack("S a*", AF_UNIX, "\0" . $name)) or die "bind: $!";
connect($s, pack_sockaddr_un($path)) or die "no connection: $!\n";
my $n = 0;
while (my $r = sysread($s, my $b, 4096)) { $n += $r }
print "$n bytes\n";
`

const keySocketConfig = `volumes:
  - {id: data, device: /dev/disk/by-id/virtio-data-part1, format: true, filesystem: ext4, no_mmp: true}
  - {id: data-drop, device: /dev/disk/by-id/virtio-data-part2, format: true, filesystem: ext4, no_mmp: true}
  - {id: data-cred, device: /dev/disk/by-id/virtio-data-part3, format: true, filesystem: ext4, no_mmp: true}
key_socket:
  path: /run/keyagent/keys.sock
  drop_ins: true
  consumers:
    - {volume: data, unit: systemd-cryptsetup@data.service}
    - {volume: data-drop, unit: systemd-cryptsetup@data\x2ddrop.service}
    - {volume: data-cred, unit: vault.service, credential: vault-key}
    - {volume: data-cred, unit: thief.service, credential: vault-key}
`

const vaultUnit = `[Unit]
After=network-online.target
[Service]
Type=oneshot
RemainAfterExit=yes
LoadCredential=vault-key:/run/keyagent/keys.sock
ExecStart=/usr/lib/systemd/systemd-cryptsetup attach data-cred /dev/disk/by-id/virtio-data-part3 %d/vault-key luks,headless=true
ExecStart=/usr/bin/mount --mkdir /dev/mapper/data-cred /srv/vault
ExecStop=/usr/bin/umount /srv/vault
ExecStop=/usr/lib/systemd/systemd-cryptsetup detach data-cred
`

// keySocketFiles are those of a node whose volumes systemd maps.
func keySocketFiles(t *testing.T, n *node) []lab.File {
	t.Helper()
	files, err := demo.AgentFiles(n.service.CA())
	must(t, err)
	config, _, found := bytes.Cut(files[0].Data, []byte("volumes:\n"))
	if !found {
		t.Fatalf("the demo's configuration is another: %s", files[0].Data)
	}
	files[0].Data = append(bytes.Clone(config), keySocketConfig...)
	return append(files,
		lab.File{Path: unitFolder + "keyagent-keys.socket", Data: unitFile(t, "keyagent-keys.socket")},
		lab.File{Path: "/etc/systemd/system/keyagent-keys.socket.d/drop-ins.conf", Data: []byte("[Socket]\nListenStream=/run/cryptsetup-keys.d/data-drop.key\n")},
		lab.File{Path: "/etc/systemd/system/sockets.target.wants/keyagent-keys.socket", Link: unitFolder + "keyagent-keys.socket"},
		lab.File{Path: "/etc/systemd/system/systemd-cryptsetup@data.service.d/keyagent.conf", Data: []byte("[Service]\nExecStartPost=/usr/bin/keyagent unlock --need-agent data\n")},
		lab.File{Path: "/etc/systemd/system/vault.service", Data: []byte(vaultUnit)},
		lab.File{Path: "/etc/crypttab", Data: []byte("data /dev/disk/by-id/virtio-data-part1 /run/keyagent/keys.sock luks,_netdev,headless=true\n" +
			"data-drop /dev/disk/by-id/virtio-data-part2 none luks,_netdev,headless=true\n")},
		lab.File{Path: "/etc/fstab", Data: []byte("/dev/mapper/data /srv/data ext4 _netdev,nofail 0 0\n/dev/mapper/data-drop /srv/drop ext4 _netdev,nofail 0 0\n")},
		lab.File{Path: "/srv/drop/.not-mounted", Data: []byte("\n")},
		lab.File{Path: "/srv/data/.not-mounted", Data: []byte("\n")},
		lab.File{Path: "/usr/bin/forge", Data: []byte(forge), Mode: 0o755})
}

// The partitions of a disk begin there, and each is as large.
const partStart, partSize = 1 << 20, 40 << 20

// partition gives the machine's disk partitions, at most four.
func partition(t *testing.T, n *node, count int) {
	t.Helper()
	const part = partSize / 512
	sector := make([]byte, 512)
	for i := range count {
		entry := sector[446+16*i:]
		entry[4] = 0x83
		binary.LittleEndian.PutUint32(entry[8:], uint32(partStart/512+i*part))
		binary.LittleEndian.PutUint32(entry[12:], part)
	}
	copy(sector[510:], "\x55\xaa")
	must(t, os.Truncate(n.disk, partStart+int64(count)*partSize))
	f, err := os.OpenFile(n.disk, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(sector, 0)
	must(t, err)
	must(t, f.Close())
}

// The key socket: systemd's own programs open volumes with keys that they ask for, in
// each way that they know, and nobody else on the machine is given one.
func TestAKeySocketOpensALineOfCrypttab(t *testing.T) {
	n := newNode(t, commandLine("keysocket"))
	n.limit = 8 * time.Minute // each transient unit takes seconds under emulation
	partition(t, n, 3)
	esp := n.path("expected.esp")
	verbs := []string{"wrote", "read"}
	if os.Getenv("KEYAGENT_BOOTS_FULL") == "" {
		verbs = verbs[:1] // TestCrypttabOpensItsDisks finds what its first boot wrote
	}
	for i, verb := range verbs {
		g := n.boot(t, esp, n.root(t, keySocketScript, keySocketFiles(t, n)...))
		wantStatus(t, g, 0)
		for _, at := range []string{"data", "drop", "vault"} {
			wantLines(t, g, "E2E "+verb+" /srv/"+at+": written by the first boot")
		}
		first := []string{"E2E booted: failed active active active", "E2E created by hand", "E2E was mapped already"}
		if i > 0 {
			first = []string{"E2E booted: active active active active"}
		}
		wantLines(t, g, append(first,
			"E2E working: active active active active", "E2E open data data-drop data-cred", "E2E absent data data-cred",
			"E2E again: written by the first boot, written by the first boot", "E2E again: active active active active",
			"E2E verified keys", "E2E asked for a passphrase: 0 times")...)
		forged(t, g)
		if hasLine(g, "ALARM") {
			complain(t, "boot %d: an honest mapping was taken out of use", i+1)
		}
		if formatted := hasLine(g, `"step":"formatted"`); formatted != (i == 0) {
			complain(t, "boot %d: formatted: %v", i+1, formatted)
		}
		log, err := os.ReadFile(n.service.AuditLog())
		must(t, err)
		if got := bytes.Count(log, []byte(`"release-lease"`)); got < 2*(i+1) {
			complain(t, "boot %d: leases were given back %d times in all", i+1, got)
		}
		logTimeline(t, i+1, g)
	}
}

// forged asserts that no forged caller got a byte, and that the journal says why.
func forged(t *testing.T, g *lab.Guest) {
	t.Helper()
	for who, got := range map[string]string{
		"by the shell":                     "0 bytes",
		"by another user":                  "no connection: Permission denied",
		"by another unit":                  "0 bytes",
		"by the unit of another volume":    "0 bytes",
		"by a unit that has a credential":  "0 bytes",
		"for a credential that it has not": "0 bytes",
		"by root of a user namespace":      "0 bytes",
		"as tpm2":                          "0 bytes",
		"by a unit that loads it":          "0 /run/credentials/other.service/vault-key",
	} {
		wantLines(t, g, "E2E forged "+who+": "+got)
	}
	wantLines(t, g, "no rule of key_socket.consumers names this unit", "the caller is in another namespace: user",
		"asks for no key")
	for _, l := range g.Lines() {
		if strings.Contains(l.Text, "Give root password") || strings.Contains(strings.ToLower(l.Text), "enter passphrase for") {
			complain(t, "the console asks: %s", l.Text)
		}
	}
}
