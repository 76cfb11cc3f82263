//go:build umlguest

package disks

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// outage is a volume that is kept for one, and its machine.
type outage struct {
	*machine
	at, line string
}

var (
	sameKernel  = make([]byte, 32)
	otherKernel = bytes.Repeat([]byte{1}, 32)
)

// inOutage is a machine that gives up on its key service soon.
func inOutage(t *testing.T, name, device, at string) *outage {
	t.Helper()
	w, _ := lab()
	w.serve(t)
	o := &outage{machine: w.node(t, name), at: at,
		line: fmt.Sprintf("{id: off-1, name: off-%s, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s, offline: {for: 2h, boots: 3}}", name, device, at)}
	o.patient, o.more = true, fmt.Sprintf("retry: {budget: 2s, first: 50ms, max: 500ms}\nwatch: 1s\ndevice_timeout: 5s\noffline_dir: %s/kept\n", o.dir)
	o.configure(t, o.line)
	removed(t, "off-"+name)
	return o
}

// reboot loses what is in memory, and measures a kernel.
func (o *outage) reboot(t *testing.T, kernel []byte) {
	t.Helper()
	_ = exec.Command("umount", o.at).Run()
	_ = exec.Command("dmsetup", "remove", "--retry", "off-"+o.name).Run()
	check(t, os.RemoveAll(filepath.Join(o.dir, "state")))
	o.tpm.Restart(t)
	check(t, swtpm.Extend(o.tpm.Device, 4, kernel))
}

func (o *outage) opens(t *testing.T, what string) {
	t.Helper()
	out := o.must(t, "unlock", "off-1")
	if !strings.Contains(out, "OFFLINE") || !strings.Contains(out, "warning: off-1: opened without the key service") {
		t.Errorf("%s: nobody says that it was opened without the key service:\n%s", what, out)
	}
	holds(t, filepath.Join(o.at, "file"), "text")
}

func (w *world) audited(t *testing.T, event string) int {
	t.Helper()
	return bytes.Count(must[[]byte](t)(os.ReadFile(filepath.Join(w.dir, "audit.log"))), []byte(`"event":"`+event+`"`))
}

// While the key service is down a machine opens its volume for the boots that were granted,
// as it was attested, and nobody else does.
func TestDiskAVolumeOpensInAnOutage(t *testing.T) {
	device := disk(t, diskSize)
	o := inOutage(t, "outage-1", device, mountPoint(t, "data"))
	thief := inOutage(t, "outage-2", device, mountPoint(t, "data"))
	defer o.serve(t)
	o.must(t, "unlock", "off-1")
	put(t, filepath.Join(o.at, "file"), "text")
	before := o.tpm.Snapshot(t)

	o.stop()
	o.reboot(t, sameKernel)
	o.opens(t, "the first boot")
	check(t, exec.Command("umount", o.at).Run())
	check(t, exec.Command("dmsetup", "remove", "--retry", "off-outage-1").Run())
	o.opens(t, "a second opening")
	o.reboot(t, otherKernel)
	o.fails(t, 4, "did not boot as when the key was kept", "unlock", "off-1")
	o.reboot(t, sameKernel)
	o.opens(t, "the third boot")

	// The host clones the disks, or puts the TPM's state back.
	check(t, os.CopyFS(filepath.Join(thief.dir, "kept"), os.DirFS(filepath.Join(o.dir, "kept"))))
	thief.fails(t, 4, "another TPM", "unlock", "off-1")
	now := o.tpm.Snapshot(t)
	o.tpm.RollBack(t, before)
	o.reboot(t, sameKernel)
	o.fails(t, 4, "the TPM's state is older", "unlock", "off-1")
	o.tpm.RollBack(t, now)

	o.reboot(t, sameKernel)
	o.fails(t, 4, "used up", "unlock", "off-1")

	// It hears of all that with the first question, and grants anew.
	o.serve(t)
	told := o.audited(t, "opened-offline")
	o.must(t, "unlock", "off-1")
	holds(t, filepath.Join(o.at, "file"), "text")
	if got := o.audited(t, "opened-offline"); got != told+1 {
		t.Errorf("%d openings are audited, there were %d", got, told)
	}
	o.stop()
	o.reboot(t, sameKernel)
	o.opens(t, "after another grant")
	o.reboot(t, sameKernel)
	check(t, swtpm.AdvanceClock(o.tpm.Device, 3*time.Hour))
	o.fails(t, 4, "the time for which the key was kept is over", "unlock", "off-1")
}

// An agent opens its volumes so, goes on asking, and is a usual one with the first answer. The
// lease stays with the kept key until somebody says that another machine is to have it.
func TestDiskAnAgentComesUpInAnOutage(t *testing.T) {
	device := disk(t, diskSize)
	o := inOutage(t, "outage-3", device, mountPoint(t, "data"))
	other := inOutage(t, "outage-4", device, mountPoint(t, "data"))
	line := strings.Replace(o.line, "off-1", "off-2", 1)
	o.configure(t, line)
	other.configure(t, strings.Replace(other.line, "off-1", "off-2", 1))
	defer o.serve(t)
	a := o.start(t)
	a.waitFor(t, `msg=ready`)
	put(t, filepath.Join(o.at, "file"), "text")
	a.kill()
	o.stop()
	o.reboot(t, sameKernel)

	a = o.start(t)
	a.waitFor(t, "OFFLINE")
	a.waitFor(t, `msg=ready`)
	holds(t, filepath.Join(o.at, "file"), "text")
	if out := o.must(t, "status", "off-2"); !strings.Contains(out, "opened without the key service") {
		t.Errorf("status: %s", out)
	}
	a.kill()
	a = o.start(t) // in the same boot; nothing is asked of the TPM
	a.waitFor(t, `msg=ready`)
	told := o.audited(t, "opened-offline")
	o.serve(t)
	a.waitFor(t, "the key service knows of a volume that was opened without it")
	if got := o.audited(t, "opened-offline"); got <= told {
		t.Error("the opening is not audited")
	}
	if out := o.must(t, "status", "off-2"); strings.Contains(out, "opened without the key service") {
		t.Errorf("status: %s", out)
	}
	eventually(t, "another grant", func() bool { return strings.Contains(a.log.String(), `step="kept for an outage"`) })

	o.must(t, "close", "off-2")
	other.fails(t, 16, "until it gives the volume back", "unlock", "off-2")
	// A mapping that nobody remembers may be written to: the lease stays.
	tool(t, "dmsetup", "create", "off-"+o.name, "--table", "0 8 zero")
	o.fails(t, 15, "there is a mapping", "close", "--give-back", "off-2")
	tool(t, "dmsetup", "remove", "--retry", "off-"+o.name)
	o.must(t, "close", "--give-back", "off-2")
	other.must(t, "unlock", "off-2")
	holds(t, filepath.Join(other.at, "file"), "text")
	other.must(t, "close", "--give-back", "off-2")
	a.kill()
	o.stop()
	o.reboot(t, sameKernel)
	o.fails(t, 4, "no key is kept", "unlock", "off-2")
}
