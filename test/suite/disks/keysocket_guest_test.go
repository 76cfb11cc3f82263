//go:build umlguest

package disks

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// asks stands in for systemd-cryptsetup: it asks for a key in the same way, keeps it in a
// file, and then does what a test wants.
const asks = `use strict; use Socket;
my ($name, $path, $key, $then) = @ARGV;
socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die "socket: $!";
bind($s, pack("S a*", AF_UNIX, "\0" . $name)) or die "bind: $!";
connect($s, pack_sockaddr_un($path)) or die "connect: $!";
shutdown($s, 1);
my $all = "";
while (sysread($s, my $b, 4096)) { $all .= $b }
die "nothing was given\n" if $all eq "";
open(my $f, ">", $key) or die; print $f $all; close($f);
exit(system("/bin/sh", "-e", "-c", $then) >> 8);
`

// ask asks for the key of a volume as its unit, and does something with it.
func (m *machine) ask(t *testing.T, id, then string) (out string, ok bool) {
	t.Helper()
	if err := exec.Command("mountpoint", "-q", "/run/cgroup").Run(); err != nil {
		check(t, os.MkdirAll("/run/cgroup", 0o755))
		tool(t, "mount", "-t", "cgroup2", "none", "/run/cgroup")
	}
	group := `/run/cgroup/system.slice/system-systemd\x2dcryptsetup.slice/systemd-cryptsetup@` + id + ".service"
	check(t, os.MkdirAll(group, 0o755))
	script, key := filepath.Join(m.dir, "asks.pl"), filepath.Join(m.dir, "given")
	check(t, os.WriteFile(script, []byte(asks), 0o644))
	cmd := exec.Command("/bin/sh", "-c", `echo $$ >"$0/cgroup.procs"; exec "$@"`, group, "perl", script, "beef/cryptsetup/"+id, filepath.Join(m.dir, "keys.sock"), key, "key="+key+"\n"+then)
	text, err := cmd.CombinedOutput()
	return string(text), err == nil
}

// handsOut makes a volume whose key the node's agent hands out.
func (m *machine) handsOut(t *testing.T, id string) (device string, running *agent) {
	t.Helper()
	device = disk(t, diskSize)
	removed(t, id)
	m.more = fmt.Sprintf("key_socket: {path: %s/keys.sock, consumers: [{volume: %s, unit: systemd-cryptsetup@%s.service}]}\n", m.dir, id, id)
	m.patient = true
	t.Cleanup(func() { m.more, m.patient = "", false })
	m.configure(t, fmt.Sprintf("{id: %s, device: %s, format: true, filesystem: ext4, no_mmp: true}", id, device))
	running = m.start(t)
	running.waitFor(t, "msg=ready")
	return device, running
}

const opens = `cryptsetup open --key-file $key %s %s`

// The volume is created when systemd asks for the first time, opened by a program that is
// not ours, and closed by it.
func TestDiskAKeyIsHandedOut(t *testing.T) {
	n := first(t)
	device, running := n.handsOut(t, "v-out")
	if mapped("v-out") {
		t.Error("the agent opened it by itself")
	}
	for range 2 {
		if out, ok := n.ask(t, "v-out", fmt.Sprintf(opens, device, "v-out")); !ok {
			t.Fatalf("%s\n%s", out, running.log)
		}
		eventually(t, "it is open", func() bool {
			out := n.must(t, "status")
			return strings.Contains(out, "open") && strings.Contains(out, "held")
		})
		// It is mapped, and there is nothing to hand out.
		if out, ok := n.ask(t, "v-out", "true"); ok || !strings.Contains(out, "nothing was given") {
			t.Errorf("a second time: %s", out)
		}
		n.must(t, "unlock", "--need-agent", "v-out")
		tool(t, "cryptsetup", "close", "v-out")
		eventually(t, "the agent sees that it is closed", func() bool { return !strings.Contains(n.must(t, "status"), "held") })
		running.waitFor(t, "another program closed the volume")
	}
	if strings.Count(running.log.String(), "step=formatted") != 1 {
		t.Error("it was not formatted once")
	}
	// A restarted agent takes up what was opened while it was away.
	if out, ok := n.ask(t, "v-out", fmt.Sprintf("kill -KILL %d\n"+opens, running.cmd.Process.Pid, device, "v-out")); !ok {
		t.Fatal(out)
	}
	running = n.start(t)
	running.waitFor(t, "msg=ready")
	eventually(t, "it is compared", func() bool { return strings.Contains(n.must(t, "status"), "held") })
	n.must(t, "close", "v-out")
	running.kill()
}

// A mapping that could not be compared, since no key service was there to ask for the key,
// is compared when one is.
func TestDiskAMappingThatWasNotComparedIsComparedLater(t *testing.T) {
	n := first(t)
	const id = "v-uncompared"
	device, running := n.handsOut(t, id)
	if out, ok := n.ask(t, id, fmt.Sprintf("kill -KILL %d\n"+opens, running.cmd.Process.Pid, device, id)); !ok {
		t.Fatal(out)
	}
	n.stop()
	t.Cleanup(func() { n.serve(t) })
	n.patient = false
	n.configure(t, fmt.Sprintf("{id: %s, device: %s, format: true, filesystem: ext4, no_mmp: true}", id, device))
	running = n.start(t)
	running.waitFor(t, `msg="volume is not open" volume=`+id)
	if strings.Contains(running.log.String(), `msg="volume is open"`) {
		t.Fatal(running.log)
	}
	n.serve(t)
	running.waitFor(t, `msg="volume is open" volume=`+id)
	if out := n.must(t, "status"); !strings.Contains(out, "held") {
		t.Errorf("status says\n%s", out)
	}
	n.must(t, "close", id)
	running.kill()
}

// Case 89: between the agent's look and that of a program that reads the disk again the
// host changes what is there, and maybe back again. What comes of it is taken out of use.
func TestDiskAHeaderThatIsSwappedBehindAHandedOutKeyIsFound(t *testing.T) {
	n := first(t)
	id := "v-swapped"
	device, running := n.handsOut(t, id)
	if out, ok := n.ask(t, id, fmt.Sprintf(opens, device, id)); !ok {
		t.Fatal(out)
	}
	eventually(t, "it is open", func() bool { return strings.Contains(n.must(t, "status"), "held") })
	tool(t, "cryptsetup", "close", id)
	running.waitFor(t, "another program closed the volume")
	whole := peek(t, device, 0, 16*mib)
	saved := filepath.Join(n.dir, "saved.img")
	check(t, os.WriteFile(saved, whole, 0o600))
	uuid := tool(t, "cryptsetup", "luksUUID", device)
	sectors := strconv.Itoa(diskSize/512 - 32768)
	// A header that whatever passphrase opens, such as one with a null cipher, is played
	// by one that is made with the key.
	swap := `cryptsetup luksFormat -q --type luks2 --uuid UUID --key-file $key --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --cipher aes-xts-plain64 --key-size 512 --sector-size 4096 DEV
`
	swaps := map[string]struct{ then, says string }{
		"another header": {swap + "cryptsetup open --key-file $key DEV ID", "header"},
		"another header, and back": {`kill -STOP AGENT
trap 'kill -CONT AGENT' EXIT
` + swap + `cryptsetup open --key-file $key DEV ID
dd if=SAVED of=DEV bs=1M count=16 conv=notrunc,fsync 2>&1`, "was not made with this volume's key"},
		"another volume": {strings.ReplaceAll(swap, "UUID", "11111111-2222-4333-8444-555555555555") + "cryptsetup open --key-file $key DEV ID", "mapping name is taken"},
		"no encryption":  {`dmsetup create ID --table "0 SECTORS linear DEV 32768"`, "mapping name is taken"},
		"no encryption with its name": {`dmsetup create ID --uuid CRYPT-LUKS2-PLAINUUID-ID --table "0 SECTORS linear DEV 32768"`,
			"live device-mapper table is not as expected"},
		"discards": {"cryptsetup open --allow-discards --key-file $key DEV ID", "passes discards through"},
		"one that is in use": {`kill -STOP AGENT
trap 'kill -CONT AGENT' EXIT
` + swap + `cryptsetup open --key-file $key DEV ID
exec 8<>/dev/mapper/ID
sleep 1000 8<&8 >/dev/null 2>&1 &
echo $! >SAVED.pid`, "header"},
	}
	for _, name := range some(t, 3, slices.Sorted(maps.Keys(swaps))) {
		tt := swaps[name]
		t.Run(name, func(t *testing.T) {
			overwrite(t, device, 0, whole)
			before := len(running.log.String())
			then := strings.NewReplacer("PLAINUUID", strings.ReplaceAll(uuid, "-", ""), "UUID", uuid, "DEV", device, "ID", id, "SAVED", saved,
				"SECTORS", sectors, "AGENT", strconv.Itoa(running.cmd.Process.Pid)).Replace(tt.then)
			if out, ok := n.ask(t, id, then); !ok {
				t.Fatalf("%s\n%s", out, tail(running.log.String()))
			}
			eventually(t, "the alarm", func() bool { return strings.Contains(running.log.String()[before:], "volume is not open") })
			said := running.log.String()[before:]
			if !strings.Contains(said, "ALARM") || !strings.Contains(said, tt.says) {
				t.Errorf("the log says %s", said)
			}
			if name == "one that is in use" {
				if table := tool(t, "dmsetup", "table", id); !strings.Contains(table, "error") {
					t.Errorf("it can be used: %s", table)
				}
				tool(t, "kill", strings.TrimSpace(string(must[[]byte](t)(os.ReadFile(saved+".pid")))))
				tool(t, "dmsetup", "remove", "--retry", id)
			} else if mapped(id) {
				t.Error("it is mapped")
			}
			if out := n.must(t, "status"); strings.Contains(out, "held") || !strings.Contains(out, "failed") {
				t.Errorf("status says\n%s", out)
			}
		})
	}
	// Before the key leaves, the same header gets none.
	overwrite(t, device, 0, make([]byte, 4096))
	if out, ok := n.ask(t, id, "true"); ok || !strings.Contains(out, "nothing was given") {
		t.Errorf("a damaged header: %s", out)
	}
	overwrite(t, device, 0, whole)
	// Who asks and maps nothing gives the lease back.
	if out, ok := n.ask(t, id, "true"); !ok {
		t.Error(out)
	}
	running.waitFor(t, "nobody mapped the volume with the key that was handed out")
	if out := n.must(t, "status"); strings.Contains(out, "held") {
		t.Errorf("status says\n%s", out)
	}
	if out, ok := n.ask(t, id, fmt.Sprintf(opens, device, id)); !ok {
		t.Fatalf("%s\n%s", out, tail(running.log.String()))
	}
	eventually(t, "it is open again", func() bool { return strings.Contains(n.must(t, "status"), "held") })
	n.must(t, "close", id)
	// An agent that dies before it has looked leaves that to the next one.
	swapped := strings.NewReplacer("UUID", uuid, "DEV", device).Replace(swap)
	if out, ok := n.ask(t, id, fmt.Sprintf("kill -KILL %d\n"+swapped+opens, running.cmd.Process.Pid, device, id)); !ok {
		t.Fatal(out)
	}
	running = n.start(t)
	running.waitFor(t, "ALARM")
	running.waitFor(t, "volume is not open")
	if mapped(id) {
		t.Error("the next agent lets it be used")
	}
	running.kill()
}
