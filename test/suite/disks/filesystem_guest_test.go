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

	"github.com/keyagent/keyagent/test/sim/seed"
)

// Case 51: a record from a backup calls a volume new that is in use.
func TestDiskARestoredRecordDoesNotFormatAFilesystemInUse(t *testing.T) {
	n := first(t)
	w := n.world
	r := seed.Rand(t)
	sample := rounds(t, 1) // of six, in each state
	for _, state := range []string{"pending", "formatted"} {
		for i, inside := range r.Perm(6) {
			inside := []string{"ext4", "old ext4", "xfs", "lvm", "swap", "btrfs"}[inside]
			if i >= sample {
				continue
			}
			t.Run(state+" over "+inside, func(t *testing.T) {
				id := "v-" + state + "-" + strings.ReplaceAll(inside, " ", "")
				device := disk(t, 400*mib)
				removed(t, id)
				n.configure(t, fmt.Sprintf("{id: %s, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", id, device, mountPoint(t, "data")))
				saved := w.recordIn(t, n, id, state)
				n.must(t, "unlock", id)
				n.must(t, "close", id)
				n.configure(t, fmt.Sprintf("{id: %s, device: %s}", id, device))
				n.must(t, "unlock", id)
				mapper := "/dev/mapper/" + id
				tool(t, "wipefs", "-qa", mapper)
				switch inside {
				case "ext4":
					tool(t, "mkfs.ext4", "-qF", mapper)
				case "old ext4":
					tool(t, "mkfs.ext4", "-qF", "-O", "^metadata_csum,^64bit", mapper)
				case "xfs":
					tool(t, "mkfs.xfs", "-qf", mapper)
				case "btrfs":
					tool(t, "mkfs.btrfs", "-qf", mapper)
				case "swap":
					tool(t, "mkswap", mapper)
				case "lvm":
					overwrite(t, mapper, 512, []byte("LABELONE\x01\x00\x00\x00\x00\x00\x00\x00\xca\xd6\x45\x61\x20\x00\x00\x00LVM2 001"))
				}
				tool(t, "sync")
				n.must(t, "close", id)
				w.putRecord(t, id, saved)
				before := tool(t, "sha256sum", device)
				n.configure(t, fmt.Sprintf("{id: %s, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", id, device, mountPoint(t, "again")))
				out, code := n.run(t, "unlock", id)
				if code == 0 || code == 1 {
					t.Errorf("exit code %d: %s", code, out)
				}
				if after := tool(t, "sha256sum", device); after != before {
					t.Errorf("the disk was written to: %s", out)
				}
			})
		}
	}
}

// recordIn stops the making of a volume when its record has a state, and returns the
// record's object.
func (w *world) recordIn(t *testing.T, n *machine, id, state string) []byte {
	t.Helper()
	path := filepath.Join(w.dir, "records/volumes", id+".obj")
	for try := range 200 {
		// It is killed a little later each time.
		cmd := n.command("unlock", id)
		check(t, cmd.Start())
		var data []byte
		for range 4000 {
			data, _ = os.ReadFile(path)
			if bytes.Contains(data, []byte(`"state":"`+state+`"`)) {
				break
			}
			if bytes.Contains(data, []byte(`"state":"active"`)) {
				t.Fatalf("try %d: the record was never seen %s", try, state)
			}
			time.Sleep(time.Millisecond)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if bytes.Contains(data, []byte(`"state":"`+state+`"`)) {
			return data
		}
	}
	t.Fatalf("no record is %s", state)
	return nil
}

// putRecord puts an older record in the place of the one that is there, and lets the
// key service forget that it ever saw another.
func (w *world) putRecord(t *testing.T, id string, data []byte) {
	t.Helper()
	w.stop()
	path := filepath.Join(w.dir, "records/volumes", id+".obj")
	check(t, os.WriteFile(path, data, 0o600))
	w.serve(t)
	cmd := exec.Command(program(), "volume", "accept-restore", id, "--config", "serve.yaml", "--go-back")
	cmd.Dir = w.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("accept-restore: %v: %s", err, out)
	}
}

// Case 52: a damaged filesystem is repaired by its own tool, or not mounted.
func TestDiskADamagedFilesystemIsNotMountedInSilence(t *testing.T) {
	n := first(t)
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			id, device, at := "v-damaged-"+fs, disk(t, 400*mib), mountPoint(t, "data")
			removed(t, id)
			n.configure(t, fmt.Sprintf("{id: %s, device: %s, format: true, filesystem: %s, no_mmp: true, mount: %s}", id, device, fs, at))
			n.must(t, "unlock", id)
			if options := tool(t, "findmnt", "-no", "OPTIONS", at); fs == "ext4" && !strings.Contains(options, "errors=remount-ro") {
				t.Errorf("mounted with %s", options)
			}
			put(t, filepath.Join(at, "note"), "kept")
			n.must(t, "close", id)
			if fs == "ext4" {
				// What its tool repairs by itself.
				n.configure(t, fmt.Sprintf("{id: %s, device: %s}", id, device))
				n.must(t, "unlock", id)
				tool(t, "debugfs", "-w", "-R", "ssv state 2", "/dev/mapper/"+id)
				tool(t, "debugfs", "-w", "-R", "ssv free_blocks_count 7", "/dev/mapper/"+id)
				n.must(t, "close", id)
				n.configure(t, fmt.Sprintf("{id: %s, device: %s, filesystem: ext4, no_mmp: true, mount: %s}", id, device, at))
				if out := n.must(t, "unlock", id); !strings.Contains(out, "repaired the filesystem") {
					t.Errorf("unlock says %q", out)
				}
				holds(t, filepath.Join(at, "note"), "kept")
				n.must(t, "close", id)
			}
			// The host overwrites the middle of the metadata.
			for _, place := range []int64{16 * mib, 16*mib + 65536} {
				overwrite(t, device, place, bytes.Repeat([]byte{0x5a}, 16384))
			}
			out, code := n.run(t, "unlock", id)
			if code != 17 || !strings.Contains(out, "hint:") {
				t.Errorf("exit code %d: %s", code, out)
			}
			if mounted(at) {
				t.Error("it is mounted")
			}
			if !mapped(id) {
				t.Error("it is not open for a person to repair")
			}
			if out := n.must(t, "status"); !strings.Contains(out, "failed") || !strings.Contains(out, "repair") {
				t.Errorf("status says\n%s", out)
			}
			n.must(t, "close", id)
		})
	}
}

// An open volume grows with its disk, under load.
func TestDiskAVolumeGrowsOnline(t *testing.T) {
	n := first(t)
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			id, file, at := "v-grow-"+fs, image(t, 400*mib), mountPoint(t, "data")
			device := loop(t, file)
			removed(t, id)
			n.configure(t, fmt.Sprintf("{id: %s, device: %s, format: true, filesystem: %s, no_mmp: true, mount: %s}", id, device, fs, at))
			n.must(t, "unlock", id)
			writer := exec.Command("/bin/sh", "-c", `i=0; while :; do dd if=/dev/urandom of=file bs=64k count=8 conv=fsync 2>/dev/null || exit 1; sha256sum file >sum.new && mv sum.new sum; done`)
			writer.Dir = at
			check(t, writer.Start())
			time.Sleep(500 * time.Millisecond)
			n.must(t, "resize", id) // nothing to do
			check(t, os.Truncate(file, 600*mib+7*512))
			tool(t, "losetup", "-c", device)
			n.must(t, "resize", id)
			_ = writer.Process.Kill()
			_ = writer.Wait()
			if size := tool(t, "blockdev", "--getsize64", "/dev/mapper/"+id); size != fmt.Sprint(584*mib) {
				t.Errorf("the mapping has %s bytes", size)
			}
			kib := tool(t, "/bin/sh", "-c", "df -k --output=size "+at+" | tail -1")
			var n1 int
			fmt.Sscan(kib, &n1)
			if n1 < 450*1024 {
				t.Errorf("the filesystem has %s KiB", kib)
			}
			put(t, filepath.Join(at, "note"), "kept")
			n.must(t, "close", id)
			n.must(t, "unlock", id)
			holds(t, filepath.Join(at, "note"), "kept")
			n.must(t, "close", id)
			check(t, os.Truncate(file, 500*mib))
			tool(t, "losetup", "-c", device)
		})
	}
}

// Swap and scratch volumes have keys that nobody ever sees.
func TestDiskSwapAndScratchLeaveNothing(t *testing.T) {
	n := first(t)
	swap, scratch, at := disk(t, diskSize), disk(t, diskSize), mountPoint(t, "tmp")
	removed(t, "v-swap", "v-scratch")
	n.configure(t,
		fmt.Sprintf("{id: v-swap, kind: swap, device: %s, format: true}", swap),
		fmt.Sprintf("{id: v-scratch, kind: scratch, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", scratch, at))
	out := n.must(t, "unlock")
	if swaps := tool(t, "cat", "/proc/swaps"); !strings.Contains(swaps, "dm-") && !strings.Contains(swaps, "v-swap") {
		t.Errorf("%s\n/proc/swaps:\n%s", out, swaps)
	}
	text := "a line that must not be found on the disk"
	put(t, filepath.Join(at, "note"), strings.Repeat(text+"\n", 1000))
	if table := tool(t, "dmsetup", "table", "--showkeys", "v-scratch"); !strings.Contains(table, ":64:encrypted:") {
		t.Errorf("table is %s", table)
	}
	n.must(t, "unlock") // once more changes nothing
	if _, err := os.Stat(filepath.Join(at, "note")); err != nil {
		t.Error(err)
	}
	n.must(t, "close", "--all")
	if raw := must[[]byte](t)(os.ReadFile(scratch)); bytes.Contains(raw, []byte(text)) {
		t.Error("plaintext is on the disk")
	}
	n.must(t, "unlock", "v-scratch")
	if _, err := os.Stat(filepath.Join(at, "note")); err == nil {
		t.Error("the scratch volume came back")
	}
	n.must(t, "close", "--all")
}
