//go:build umlguest

package disks

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// admin runs a command on the key service's admin socket.
func (w *world) admin(t *testing.T, args ...string) string {
	t.Helper()
	return tool(t, program(), append(args, "--admin", filepath.Join(w.dir, "admin.sock"))...)
}

// identity is the one of the machine that holds a volume, as the key service shows it.
func (w *world) identity(t *testing.T, id string) string {
	t.Helper()
	var v struct {
		Lease struct {
			Holder string
		}
	}
	check(t, json.Unmarshal([]byte(w.admin(t, "volume", "show", id, "--output", "json")), &v))
	if !strings.HasPrefix(v.Lease.Holder, "tpm:") {
		t.Fatalf("the key service shows %q as who holds it", v.Lease.Holder)
	}
	return v.Lease.Holder
}

// revoke revokes somebody for the rest of a test at most: others have the same machines.
func (w *world) revoke(t *testing.T, subject ...string) {
	t.Helper()
	w.admin(t, append([]string{"revoke"}, subject...)...)
	t.Cleanup(func() {
		lift := append([]string{"revoke", "--lift", "--admin", filepath.Join(w.dir, "admin.sock")}, subject...)
		_ = exec.Command(program(), lift...).Run()
	})
}

// state is what the agent says of a volume.
func (m *machine) state(t *testing.T, id string) string {
	t.Helper()
	var v []struct{ State string }
	check(t, json.Unmarshal([]byte(m.must(t, "status", id, "--output", "json")), &v))
	if len(v) != 1 {
		t.Fatalf("%d volumes are called %s", len(v), id)
	}
	return v[0].State
}

func (m *machine) becomes(t *testing.T, id, state string) {
	t.Helper()
	eventually(t, id+" is "+state, func() bool { return m.state(t, id) == state })
}

// with is one with more in its description.
func (m *machine) with(t *testing.T, id, more string) (at string) {
	t.Helper()
	device, at := m.one(t, id)
	m.configure(t, fmt.Sprintf("{id: %s, device: %s, filesystem: ext4, mount: %s, %s}", id, device, at, more))
	return at
}

// A machine, and then a volume, is revoked by name under I/O: within one renewal the kernel
// has no key any more and what is written waits; when it is lifted it goes on, and nothing is
// lost.
func TestDiskARevokedVolumeWaitsAndGoesOn(t *testing.T) {
	n := first(t)
	_, at := n.one(t, "r-revoked")
	a := n.start(t)
	a.waitFor(t, "msg=ready")
	who := n.identity(t, "r-revoked")
	stop := writer(t, filepath.Join(at, "log"))
	for _, subject := range [][]string{{"--node", who}, {"--volume", "r-revoked"}} {
		began := time.Now()
		n.revoke(t, subject...)
		n.becomes(t, "r-revoked", "suspended")
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("it took %v, and its lease is renewed within ten seconds", took)
		}
		size := func() int64 {
			// The page cache knows the size, also while the disk's I/O waits.
			return must[os.FileInfo](t)(os.Stat(filepath.Join(at, "log"))).Size()
		}
		before := size()
		time.Sleep(time.Second)
		if now := size(); now > before+4096 {
			t.Errorf("it goes on being written: %d, %d", before, now)
		}
		if table := tool(t, "dmsetup", "info", "-c", "--noheadings", "-o", "suspended", "r-revoked"); !strings.Contains(table, "Suspended") {
			t.Errorf("the mapping is %s", table)
		}
		n.fails(t, 18, "revoked", "resume", "r-revoked")
		n.fails(t, 18, "revoked", "unlock", "r-revoked")
		if subject[0] == "--volume" { // the next agent goes on with it
			a.kill()
			a = n.start(t)
			a.waitFor(t, "the agent stays for the leases")
		}
		if s := n.state(t, "r-revoked"); s != "suspended" {
			t.Errorf("it is %s", s)
		}
		n.admin(t, append([]string{"revoke", "--lift"}, subject...)...)
		n.becomes(t, "r-revoked", "mounted")
	}
	time.Sleep(time.Second)
	written := stop()
	holds(t, filepath.Join(at, "log"), string(written))
	n.must(t, "close", "r-revoked")
	n.must(t, "unlock", "r-revoked")
	holds(t, filepath.Join(at, "log"), string(written))
	n.must(t, "close", "r-revoked")
}

// What is to be closed is closed, and its lease goes back; what is in use is suspended.
func TestDiskARevokedVolumeIsClosed(t *testing.T) {
	n := first(t)
	for _, busy := range []bool{false, true} {
		at := n.with(t, "r-shut", "on_revoke: close")
		a := n.start(t)
		a.waitFor(t, "msg=ready")
		var user *os.File
		if busy {
			user = must[*os.File](t)(os.Open(at))
		}
		n.revoke(t, "--volume", "r-shut")
		n.becomes(t, "r-shut", map[bool]string{false: "absent", true: "suspended"}[busy])
		n.fails(t, 18, "revoked", "unlock", "r-shut", "--standalone")
		n.admin(t, "revoke", "--volume", "r-shut", "--lift")
		if busy {
			check(t, user.Close())
			n.becomes(t, "r-shut", "mounted")
		}
		n.must(t, "unlock", "r-shut")
		holds(t, filepath.Join(at, "note"), "kept")
		n.must(t, "close", "r-shut")
		a.terminate(t)
		n.admin(t, "volume", "reset", "r-shut", "--the-disk-is-lost")
	}
}

// A key service that is down is not one that refuses: a volume bears it for a time of its own,
// whatever the host does to the clock.
func TestDiskAKeyServiceThatIsDownIsBorneForAWhile(t *testing.T) {
	n := first(t)
	at := n.with(t, "r-down", "grace: {unreachable: 20s}")
	a := n.start(t)
	a.waitFor(t, "msg=ready")
	stop := writer(t, filepath.Join(at, "log"))
	n.world.stop()
	defer n.world.serve(t)
	clock := func(by string) { t.Helper(); tool(t, "date", "-s", by) }
	clock("+2 days")
	defer clock("-2 days")
	eventually(t, "status says that it is borne", func() bool {
		return strings.Contains(n.must(t, "status", "r-down", "--output", "json"), "no verdict")
	})
	clock("-4 days")
	time.Sleep(2 * time.Second)
	clock("+4 days")
	if s := n.state(t, "r-down"); s != "mounted" {
		t.Errorf("well before its time is over it is %s", s)
	}
	n.becomes(t, "r-down", "suspended")
	clock("-2 days")
	defer clock("+2 days")
	n.world.serve(t)
	n.becomes(t, "r-down", "mounted")
	written := stop()
	holds(t, filepath.Join(at, "log"), string(written))
	n.must(t, "close", "r-down")
	_ = exec.Command("sync").Run()
}

// What a node has not written when its lease ends is of before: once another node had the
// volume, the next agent of this one does not write it.
func TestDiskASuspendedVolumeThatAnotherNodeHadIsNotResumed(t *testing.T) {
	_, nodes := lab()
	a, b := nodes[0], nodes[1]
	s := share(t, 4000, [2]int{0, 0})
	atA, atB := mountPoint(t, "a"), mountPoint(t, "b")
	removed(t, "l-a", "l-b")
	a.configure(t, fmt.Sprintf("{id: x-late, name: l-a, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", s.devices[0], atA))
	b.configure(t, fmt.Sprintf("{id: x-late, name: l-b, device: %s, filesystem: ext4, no_mmp: true, mount: %s}", s.devices[1], atB))
	first := a.start(t)
	first.waitFor(t, "msg=ready")
	put(t, filepath.Join(atA, "note"), "of a")
	a.world.stop()
	eventually(t, "the volume is suspended", func() bool {
		return strings.Contains(tryTool("dmsetup", "info", "-c", "--noheadings", "-o", "suspended", "l-a"), "Suspended")
	})
	first.kill() // it would ask as soon as anybody answers
	a.world.serve(t)
	eventually(t, "the lease ends and the other node gets the volume", func() bool {
		_, code := b.run(t, "unlock")
		return code == 0
	})
	put(t, filepath.Join(atB, "note"), "of b")
	b.must(t, "close", "x-late")
	next := a.start(t)
	next.waitFor(t, "the volume is cut off its disk")
	if strings.Contains(next.log.String(), `msg="volume is open" volume=x-late`) {
		t.Error("it was resumed first")
	}
	b.must(t, "unlock")
	holds(t, filepath.Join(atB, "note"), "of b")
	b.must(t, "close", "x-late")
	next.kill()
	_ = exec.Command("umount", "-l", atA).Run()
}
