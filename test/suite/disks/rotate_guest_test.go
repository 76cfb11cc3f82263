//go:build umlguest

package disks

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyagent/keyagent/test/sim/seed"
)

// keyVersion is the one that the key service has for a volume, and the volume's state there.
func (w *world) keyVersion(t *testing.T, id string) (version int, state string) {
	t.Helper()
	var v struct {
		State      string `json:"state"`
		KeyVersion int    `json:"key_version"`
	}
	check(t, json.Unmarshal([]byte(tool(t, program(), "volume", "show", id, "--admin", filepath.Join(w.dir, "admin.sock"), "--output", "json")), &v))
	return v.KeyVersion, v.State
}

// writer writes lines to a file, each durably, until it is stopped.
func writer(t *testing.T, path string) (stop func() []byte) {
	t.Helper()
	f := must[*os.File](t)(os.Create(path))
	end, done := make(chan bool), make(chan error, 1)
	var written []byte
	go func() {
		for i := 0; ; i++ {
			select {
			case <-end:
				done <- f.Close()
				return
			default:
			}
			line := []byte(fmt.Sprintf("%d %x\n", i, sha256.Sum256(written)))
			if _, err := f.Write(line); err != nil {
				done <- err
				return
			}
			if err := f.Sync(); err != nil {
				done <- err
				return
			}
			written = append(written, line...)
		}
	}()
	return func() []byte {
		t.Helper()
		close(end)
		check(t, <-done)
		return written
	}
}

// nextAt is where the next header stands meanwhile.
const nextAt = 6 * mib

// A volume gets another key, and another one, while it is written to.
func TestDiskAKeyIsChangedUnderIO(t *testing.T) {
	n := first(t)
	device, at := n.one(t, "v-rotated")
	a := n.start(t)
	a.waitFor(t, "msg=ready")
	n.must(t, "backup-header", "v-rotated", "before")
	old := peek(t, device, 0, 290816)
	stop := writer(t, filepath.Join(at, "log"))
	for want := 2; want <= 3; want++ {
		if out := n.must(t, "rotate", "v-rotated"); !strings.Contains(out, "v-rotated") {
			t.Errorf("rotate says %q", out)
		}
		if got, state := n.keyVersion(t, "v-rotated"); got != want || state != "active" {
			t.Errorf("the volume is %s with key version %d", state, got)
		}
	}
	time.Sleep(2 * time.Second) // the header is looked at each second
	written := stop()
	now := peek(t, device, 0, 290816)
	if bytes.Equal(now[32768:], old[32768:]) || !bytes.Equal(peek(t, device, nextAt, 512), make([]byte, 512)) {
		t.Error("the keyslot is the old one, or something is left of the change")
	}
	if strings.Contains(a.log.String(), "ALARM") {
		t.Error("the agent is alarmed by its own header")
	}
	n.must(t, "backup-header", "v-rotated", "after")
	n.must(t, "suspend", "v-rotated")
	n.must(t, "resume", "v-rotated")
	n.must(t, "close", "v-rotated")
	n.fails(t, 9, "", "restore-header", "v-rotated", "before")
	overwrite(t, device, 0, old)
	n.fails(t, 9, "newest backup", "unlock", "v-rotated")
	n.must(t, "restore-header", "v-rotated", "after")
	n.must(t, "unlock", "v-rotated")
	holds(t, filepath.Join(at, "note"), "kept")
	holds(t, filepath.Join(at, "log"), string(written))
	n.must(t, "close", "v-rotated")
	n.fails(t, 15, "open it first", "rotate", "v-rotated")
}

// The node does what an operator asked for: soon while the volume is open, and when it is
// opened next.
func TestDiskAnOperatorHasAKeyChanged(t *testing.T) {
	n := first(t)
	device, at := n.one(t, "x-rotated")
	admin := func(args ...string) string {
		t.Helper()
		return tool(t, program(), append(args, "--admin", filepath.Join(n.world.dir, "admin.sock"))...)
	}
	a := n.start(t)
	a.waitFor(t, "msg=ready")
	n.fails(t, 7, "", "rotate", "x-rotated") // its grant does not say so
	if out := admin("kms", "rotate", "--volumes", "x-rot*", "--every", "12h"); !strings.Contains(out, "every 12h") {
		t.Errorf("kms rotate says %q", out)
	}
	a.waitFor(t, "the volume has another key")
	if got, state := n.keyVersion(t, "x-rotated"); got != 2 || state != "active" {
		t.Errorf("the volume is %s with key version %d", state, got)
	}
	if out := admin("volume", "show", "x-rotated"); !strings.Contains(out, "every 12h") {
		t.Errorf("volume show says %q", out)
	}
	n.must(t, "close", "x-rotated")
	admin("kms", "rotate", "--volumes", "x-rotated")
	n.must(t, "unlock", "x-rotated")
	eventually(t, "the key is changed after the volume was opened", func() bool { v, state := n.keyVersion(t, "x-rotated"); return v == 3 && state == "active" })
	eventually(t, "nothing is left", func() bool { return bytes.Equal(peek(t, device, nextAt, 512), make([]byte, 512)) })
	holds(t, filepath.Join(at, "note"), "kept")
	admin("kms", "rotate", "--volumes", "x-rotated", "--abandon")
	n.must(t, "close", "x-rotated")
}

// The agent, or the key service, is killed at one of the calls of the system by which a
// change of a key changes something. Then the agent comes up again, or its whole machine, or
// another machine takes the volume over: the volume opens, its data are there, and the change
// comes to its end.
func TestKillARotationIsCutOffAtEachSystemCall(t *testing.T) {
	w, nodes := lab()
	r := seed.Rand(t)
	volumes := 0
	life := func(part, then string, at int) (calls int) {
		volumes++
		id := fmt.Sprintf("v-rot-%d", volumes)
		n, other := nodes[0], nodes[1]
		file := image(t, diskSize)
		point := mountPoint(t, "data")
		removed(t, id)
		device := loop(t, file)
		describe := func(m *machine) {
			m.configure(t, fmt.Sprintf("{id: %s, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", id, device, point))
		}
		describe(n)
		a := n.start(t)
		a.waitFor(t, "msg=ready")
		put(t, filepath.Join(point, "note"), "kept")
		old := peek(t, device, 0, 290816)
		rotate := func() error {
			if out, code := n.run(t, "rotate", id); code != 0 {
				return fmt.Errorf("%d: %s", code, out)
			}
			return nil
		}
		victim, kill := a.cmd, a.kill
		if part == "service" {
			victim, kill = w.process, func() { _ = w.process.Process.Kill() }
		}
		calls, err := traced(t, victim, kill, at, rotate)
		if at == 0 {
			check(t, err)
		}
		if part == "service" {
			w.stop()
			w.serve(t)
		}
		a.kill()
		if then != "agent" { // the machine is gone
			tool(t, "umount", point)
			tool(t, "dmsetup", "remove", "--retry", id)
			check(t, os.RemoveAll(filepath.Join(n.dir, "state")))
		}
		if then == "another machine" {
			tool(t, program(), "volume", "takeover", id, "--admin", filepath.Join(w.dir, "admin.sock"), "--the-holder-has-stopped")
			n = other
			describe(n)
		}
		a = n.start(t)
		a.waitFor(t, "msg=ready")
		holds(t, filepath.Join(point, "note"), "kept")
		version, state := w.keyVersion(t, id)
		if state == "rotating" {
			eventually(t, "the change comes to its end", func() bool { version, state = w.keyVersion(t, id); return state == "active" })
		}
		t.Logf("%s, %s: key version %d", part, then, version)
		if changed := !bytes.Equal(peek(t, device, 32768, 4096), old[32768:32768+4096]); changed != (version == 2) {
			t.Errorf("the record has key version %d, and the keyslot has changed: %v", version, changed)
		}
		n.must(t, "close", id)
		n.must(t, "unlock", id)
		holds(t, filepath.Join(point, "note"), "kept")
		if strings.Contains(a.log.String(), "ALARM") {
			t.Errorf("the agent is alarmed by its own header:\n%s", tail(a.log.String()))
		}
		n.must(t, "close", id)
		a.kill()
		tool(t, "losetup", "-d", device)
		check(t, os.Remove(file))
		return calls
	}
	for _, part := range some(t, 1, []string{"agent", "service"}) {
		all := life(part, "agent", 0)
		t.Logf("a change of the key has %d calls of the %s", all, part)
		for _, at := range r.Perm(all)[:min(all, rounds(t, 1)*3)] {
			life(part, []string{"agent", "machine", "another machine"}[r.IntN(3)], at+1)
		}
	}
}

// A message of a change of the key is lost on its way, or its answer is, and the connection
// with it. The agent goes on by itself, or when it is asked again: nothing that writes is
// disturbed, the volume opens, and exactly one key opens it.
func TestKillAMessageOfARotationIsLost(t *testing.T) {
	w, nodes := lab()
	r := seed.Rand(t)
	relay := newRelay(t, "127.0.0.1:"+w.port)
	n := *nodes[0] // the same machine, by that way
	n.world = &world{dir: w.dir, port: relay.port, log: w.log, process: w.process}
	volumes := 0
	life := func(at int, answer bool) (messages int) {
		volumes++
		id := fmt.Sprintf("v-lost-%d", volumes)
		point, file := mountPoint(t, "data"), image(t, diskSize)
		removed(t, id)
		device := loop(t, file)
		n.configure(t, fmt.Sprintf("{id: %s, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", id, device, point))
		a := n.start(t)
		a.waitFor(t, "msg=ready")
		old := peek(t, device, 32768, 4096)
		stop := writer(t, filepath.Join(point, "log"))
		relay.count(at, answer)
		out, code := n.run(t, "rotate", id)
		messages = relay.counted()
		relay.count(0, false)
		if code != 0 {
			t.Logf("message %d, its answer %v: exit code %d: %s", at, answer, code, out)
		}
		version, state := w.keyVersion(t, id)
		if code != 0 || state != "active" {
			n.must(t, "rotate", id)
			eventually(t, "the change comes to its end", func() bool { version, state = w.keyVersion(t, id); return state == "active" })
		}
		if version < 2 || bytes.Equal(peek(t, device, 32768, 4096), old) {
			t.Errorf("message %d, its answer %v: the volume has key version %d", at, answer, version)
		}
		written := stop()
		n.must(t, "close", id)
		n.must(t, "unlock", id)
		holds(t, filepath.Join(point, "log"), string(written))
		n.must(t, "close", id)
		if strings.Contains(a.log.String(), "ALARM") {
			t.Errorf("the agent is alarmed by its own header:\n%s", tail(a.log.String()))
		}
		a.kill()
		tool(t, "losetup", "-d", device)
		check(t, os.Remove(file))
		return messages
	}
	all := life(0, false)
	t.Logf("a change of the key has %d messages of the node", all)
	if all < 3 {
		t.Fatal("too few of them")
	}
	for _, at := range r.Perm(2 * all)[:min(2*all, rounds(t, 1)*4)] {
		life(at/2+1, at%2 == 1)
	}
}

// A node that was frozen while another one had the volume and changed its key puts nothing
// back: the header that it knows opens nothing any more.
func TestDiskAFrozenNodePutsNoOldHeaderBack(t *testing.T) {
	_, nodes := lab()
	a, b := nodes[0], nodes[1]
	s := share(t, 2000, [2]int{0, 0})
	atA, atB := mountPoint(t, "a"), mountPoint(t, "b")
	removed(t, "f-a", "f-b")
	a.configure(t, fmt.Sprintf("{id: v-frozen, name: f-a, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", s.devices[0], atA))
	b.configure(t, fmt.Sprintf("{id: v-frozen, name: f-b, device: %s, filesystem: ext4, no_mmp: true, mount: %s}", s.devices[1], atB))
	frozen := a.start(t)
	frozen.waitFor(t, "msg=ready")
	check(t, frozen.cmd.Process.Signal(syscall.SIGSTOP))
	tool(t, program(), "volume", "takeover", "v-frozen", "--admin", filepath.Join(a.world.dir, "admin.sock"), "--the-holder-has-stopped")
	b.must(t, "unlock")
	put(t, filepath.Join(atB, "note"), "of b")
	b.must(t, "rotate", "v-frozen")
	b.must(t, "close", "v-frozen")
	check(t, frozen.cmd.Process.Signal(syscall.SIGCONT))
	frozen.waitFor(t, "the volume is cut off its disk")
	time.Sleep(2 * time.Second) // it looks at the header each second
	b.must(t, "unlock")
	holds(t, filepath.Join(atB, "note"), "of b")
	b.must(t, "close", "v-frozen")
	frozen.kill()
	_ = exec.Command("umount", "-l", atA).Run()
}

// A key that another process of this machine changed is the agent's as well.
func TestDiskAnAgentHearsOfAKeyThatItsNeighbourChanged(t *testing.T) {
	n := first(t)
	_, at := n.one(t, "v-beside")
	a := n.start(t)
	a.waitFor(t, "msg=ready")
	n.must(t, "rotate", "v-beside", "--standalone")
	time.Sleep(3 * time.Second)
	n.must(t, "suspend", "v-beside")
	n.must(t, "resume", "v-beside")
	if strings.Contains(a.log.String(), "ALARM") {
		t.Errorf("the agent is alarmed:\n%s", tail(a.log.String()))
	}
	n.must(t, "rotate", "v-beside")
	if v, state := n.keyVersion(t, "v-beside"); v != 3 || state != "active" {
		t.Errorf("the volume is %s with key version %d", state, v)
	}
	n.must(t, "close", "v-beside")
	n.must(t, "unlock", "v-beside")
	holds(t, filepath.Join(at, "note"), "kept")
	n.must(t, "close", "v-beside")
}
