//go:build umlguest

package disks

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// one makes a volume with a note in it, and closes it.
func (m *machine) one(t *testing.T, id string, more ...string) (device, at string) {
	t.Helper()
	device, at = disk(t, diskSize), mountPoint(t, "data")
	removed(t, id)
	m.configure(t, append([]string{fmt.Sprintf("{id: %s, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", id, device, at)}, more...)...)
	m.must(t, "unlock", id)
	put(t, filepath.Join(at, "note"), "kept")
	m.must(t, "close", id)
	return device, at
}

// Case 50: one byte of one copy is changed.
func TestDiskADamagedCopyOfTheHeaderIsRebuilt(t *testing.T) {
	n := first(t)
	for i, name := range []string{"primary", "secondary"} {
		t.Run(name, func(t *testing.T) {
			id := "v-" + name
			device, at := n.one(t, id)
			whole := peek(t, device, 0, 290816)
			place := int64(i*16384 + 5000)
			overwrite(t, device, place, []byte{peek(t, device, place, 1)[0] ^ 1})
			out := n.must(t, "unlock", id)
			if !strings.Contains(out, "the "+name+" copy of the header is damaged") {
				t.Errorf("unlock says %q", out)
			}
			holds(t, filepath.Join(at, "note"), "kept")
			if bytes.Equal(peek(t, device, 0, 290816), whole) {
				t.Error("it was rebuilt without a word from anybody")
			}
			n.must(t, "restore-header", id)
			if !bytes.Equal(peek(t, device, 0, 290816), whole) {
				t.Error("the header is not what it was")
			}
			n.must(t, "close", id)
			if out := n.must(t, "unlock", id); strings.Contains(out, "damaged") {
				t.Errorf("after it was rebuilt unlock says %q", out)
			}
			n.must(t, "close", id)
		})
	}
}

// Case 50: all of the header is gone, and a backup brings it back.
func TestDiskABackupOfTheHeaderIsWrittenBack(t *testing.T) {
	n := first(t)
	device, at := n.one(t, "v-backup")
	n.must(t, "backup-header", "v-backup", "saved")
	n.fails(t, 2, "exists", "backup-header", "v-backup", "saved")
	overwrite(t, device, 0, make([]byte, 1<<20))
	n.fails(t, 9, "", "unlock", "v-backup")
	other := filepath.Join(n.dir, "other")
	raw := must[[]byte](t)(os.ReadFile(filepath.Join(n.dir, "saved")))
	raw[100000] ^= 1
	check(t, os.WriteFile(other, raw, 0o600))
	n.fails(t, 9, "", "restore-header", "v-backup", other)
	if !bytes.Equal(peek(t, device, 0, 4096), make([]byte, 4096)) {
		t.Error("a header that is not the recorded one was written")
	}
	n.must(t, "restore-header", "v-backup", "saved")
	n.must(t, "unlock", "v-backup")
	holds(t, filepath.Join(at, "note"), "kept")
	n.must(t, "close", "v-backup")
}

// Case 50: the host writes over the header while the volume is open. The node that
// holds the lease has it in memory.
func TestDiskTheHeaderOfAnOpenVolumeIsWatched(t *testing.T) {
	n := first(t)
	device, at := n.one(t, "v-watched")
	whole := peek(t, device, 0, 290816)
	a := n.start(t)
	a.waitFor(t, `msg=ready`)
	overwrite(t, device, 0, bytes.Repeat([]byte("host"), 4096))
	a.waitFor(t, "ALARM")
	a.waitFor(t, "put the header back")
	if !bytes.Equal(peek(t, device, 0, 290816), whole) {
		t.Error("the header is not what it was")
	}
	if out := n.must(t, "status"); !strings.Contains(out, "overwritten on the disk") {
		t.Errorf("status says\n%s", out)
	}
	holds(t, filepath.Join(at, "note"), "kept")
	n.must(t, "close", "v-watched")
}

// Case 53: a stock tool opened the host's header under the volume's name.
func TestDiskAMappingOfAnotherToolIsNotAdopted(t *testing.T) {
	n := first(t)
	device, at := n.one(t, "v-adopted")
	whole := peek(t, device, 0, diskSize)
	uuid := tool(t, "cryptsetup", "luksUUID", device)
	// The host's own volume, with the same UUID and whatever key opens it.
	key := filepath.Join(n.dir, "host.key")
	check(t, os.WriteFile(key, bytes.Repeat([]byte{7}, 32), 0o600))
	tool(t, "cryptsetup", "luksFormat", "-q", "--type", "luks2", "--uuid", uuid, "--key-file", key, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
		"--cipher", "aes-xts-plain64", "--key-size", "512", "--sector-size", "4096", device)
	tool(t, "cryptsetup", "open", "--key-file", key, "--perf-no_read_workqueue", "--perf-no_write_workqueue", device, "v-adopted")
	tool(t, "mkfs.ext4", "-q", "/dev/mapper/v-adopted")
	n.fails(t, 9, "", "unlock", "v-adopted") // the header is not the recorded one
	overwrite(t, device, 0, whole)           // now the header is, and the mapping is the host's
	n.fails(t, 10, "not made with this volume's key", "unlock", "v-adopted")
	if mounted(at) {
		t.Error("the host's filesystem is mounted")
	}
	n.fails(t, 10, "", "close", "v-adopted")
	if !mapped("v-adopted") {
		t.Error("a mapping that is not ours was closed")
	}
	tool(t, "cryptsetup", "close", "v-adopted")
	n.must(t, "unlock", "v-adopted")
	holds(t, filepath.Join(at, "note"), "kept")
	// What is ours, and nobody remembers, is proved and adopted.
	check(t, os.RemoveAll(filepath.Join(n.dir, "state")))
	if out := n.must(t, "unlock", "v-adopted"); !strings.Contains(out, "took over a mapping") {
		t.Errorf("unlock says %q", out)
	}
	n.must(t, "close", "v-adopted")
}
