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
)

// A volume with integrity lives as any other does, and gives an error for what
// the host changed.
func TestDiskAVolumeWithIntegrity(t *testing.T) {
	n := patient(t)
	for _, kind := range append(some(t, 1, []string{"ext4 hmac-sha256", "xfs hmac-sha256", "ext4 aegis128", "xfs aegis128", "none aegis128"}), "none hmac-sha256") {
		fs, integrity, _ := strings.Cut(kind, " ")
		t.Run(kind, func(t *testing.T) {
			size := int64(diskSize)
			if fs == "xfs" {
				size = 400 * mib
			}
			id, file := "v-integrity-"+fs+"-"+integrity, image(t, size)
			device, at := loop(t, file), mountPoint(t, "data")
			removed(t, id, id+"_dif")
			line := fmt.Sprintf("{id: %s, device: %s, format: true, integrity: %s", id, device, integrity)
			if fs != "none" {
				line += fmt.Sprintf(", filesystem: %s, mount: %s", fs, at)
			}
			if fs != "xfs" {
				line += ", no_mmp: true, no_journal: true" // a journal of a disk this small makes a wipe slow
			}
			n.configure(t, line+"}")
			n.must(t, "unlock", id)
			want := map[string]string{"hmac-sha256": "authenc(hmac(sha256),xts(aes))", "aegis128": "aegis128-random"}[integrity]
			if table := tool(t, "dmsetup", "table", id); !strings.Contains(table, want) {
				t.Errorf("it is mapped as %s", table)
			}
			n.must(t, "unlock", id) // it is open already
			keeps := func() {}
			if fs != "none" {
				put(t, filepath.Join(at, "note"), "kept")
				keeps = func() { holds(t, filepath.Join(at, "note"), "kept") }
			}
			n.must(t, "suspend", id)
			n.must(t, "resume", id)
			keeps()
			n.must(t, "close", id)
			if mapped(id) || mapped(id+"_dif") {
				t.Error("it is not closed")
			}
			n.must(t, "unlock", id)
			keeps()

			n.fails(t, 15, "does not grow", "resize", id)
			keeps()
			// A mapping that is left below holds the lease.
			if fs == "none" {
				n.must(t, "close", id)
				n.must(t, "unlock", id)
				tool(t, "dmsetup", "remove", "--retry", id)
				n.must(t, "close", id)
				if mapped(id + "_dif") {
					t.Error("its lease was given back, and the mapping below is left")
				}
				n.must(t, "unlock", id)
			}
			if fs == "none" {
				changedByTheHost(t, n, id, device, file)
			}
			n.must(t, "close", id)
			// A configuration that says nothing of it opens what is there; one that asks for
			// it does not open a volume without.
			n.configure(t, strings.NewReplacer(", integrity: "+integrity, "", ", no_journal: true", "").Replace(line)+"}")
			n.must(t, "unlock", id)
			if !mapped(id + "_dif") {
				t.Error("it was opened without its tags")
			}
			n.must(t, "close", id)
		})
	}
	plain := disk(t, diskSize)
	removed(t, "v-plain")
	n.configure(t, fmt.Sprintf("{id: v-plain, device: %s, format: true}", plain))
	n.must(t, "unlock", "v-plain")
	n.configure(t, fmt.Sprintf("{id: v-plain, device: %s, integrity: hmac-sha256}", plain))
	n.fails(t, 3, "integrity", "unlock", "v-plain") // while it is open
	n.must(t, "close", "v-plain")
	n.fails(t, 3, "integrity", "unlock", "v-plain")
}

// patient is the first node with the program's own limits: a kernel that meets the
// algorithms of integrity for the first time tests them, for seconds in this guest.
func patient(t *testing.T) *machine {
	t.Helper()
	n := first(t)
	n.patient = true
	t.Cleanup(func() { n.patient = false })
	return n
}

// changedByTheHost flips one bit of a sector on the disk.
func changedByTheHost(t *testing.T, n *machine, id, device, file string) {
	t.Helper()
	const at = 3 * mib
	text := bytes.Repeat([]byte("sector!!"), 512)
	check(t, os.WriteFile(filepath.Join(t.TempDir(), "sector"), text, 0o600))
	overwrite(t, "/dev/mapper/"+id, at, text)
	dd := func() error {
		_, err := os.ReadFile("/dev/mapper/" + id)
		return err
	}
	check(t, dd())
	cipher := []byte(toolRaw(t, "dd", "if=/dev/mapper/"+id+"_dif", "bs=4096", "count=1", "iflag=direct", fmt.Sprintf("skip=%d", at/4096), "status=none"))
	n.must(t, "close", id)
	data := must[[]byte](t)(os.ReadFile(file))
	where := bytes.LastIndex(data, cipher)
	if where < 0 {
		t.Fatal("the sector is not on the disk")
	}
	overwrite(t, device, int64(where)+100, []byte{cipher[100] ^ 4})
	n.must(t, "unlock", id)
	if err := dd(); err == nil || !strings.Contains(err.Error(), "input/output error") && !strings.Contains(err.Error(), "multibyte") {
		t.Errorf("what the host changed reads with %v", err)
	}
	overwrite(t, "/dev/mapper/"+id, at, text)
	check(t, dd()) // written again, it is good again
}

// A first format is cut off while tags are made: the next agent goes on, and nothing
// of it is taken for somebody's data.
func TestDiskAFormatWithIntegrityThatWasCutOffGoesOn(t *testing.T) {
	n := patient(t)
	device, at := disk(t, 512*mib), mountPoint(t, "data")
	removed(t, "v-integrity-cut", "v-integrity-cut_dif")
	n.configure(t, fmt.Sprintf("{id: v-integrity-cut, device: %s, format: true, integrity: hmac-sha256, no_journal: true, filesystem: ext4, no_mmp: true, mount: %s}", device, at))
	for i := range 2 {
		running := n.start(t)
		eventually(t, "the volume is mapped, and wiped from then on", func() bool { return mapped("v-integrity-cut") })
		if i == 0 {
			running.terminate(t)
			// As after a boot: nothing is mapped, and the attempt is another one.
			_ = exec.Command("dmsetup", "remove", "--retry", "v-integrity-cut").Run()
			check(t, os.RemoveAll(filepath.Join(n.dir, "state")))
			continue
		}
		running.kill()
		if !mapped("v-integrity-cut") {
			t.Fatal("it was not cut off in the middle")
		}
	}
	running := n.start(t)
	running.waitFor(t, "msg=ready")
	put(t, filepath.Join(at, "note"), "kept")
	n.must(t, "close", "v-integrity-cut")
	n.must(t, "unlock", "v-integrity-cut")
	holds(t, filepath.Join(at, "note"), "kept")
	n.must(t, "close", "v-integrity-cut")
	running.kill()
}

// toolRaw is tool for output that is no text.
func toolRaw(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return string(out)
}
