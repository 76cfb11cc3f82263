//go:build umlguest

package disks

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Sizes that are no multiple of 4096, disks that grow to one, read-only disks, and
// what is no disk.
func TestDiskOddSizesAndReadOnlyDisks(t *testing.T) {
	n := first(t)
	file, at := image(t, diskSize+7*512), mountPoint(t, "data")
	device := loop(t, file)
	removed(t, "v-odd", "v-ro", "v-file")
	n.configure(t, fmt.Sprintf("{id: v-odd, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", device, at))
	n.must(t, "unlock")
	put(t, filepath.Join(at, "note"), "kept")
	n.must(t, "close", "--all")
	check(t, os.Truncate(file, diskSize+mib+3*512))
	tool(t, "losetup", "-c", device)
	n.must(t, "unlock")
	holds(t, filepath.Join(at, "note"), "kept")
	n.must(t, "close", "--all")

	readonly := loop(t, file, "-r")
	n.configure(t, fmt.Sprintf("{id: v-odd, device: %s, filesystem: ext4, no_mmp: true, mount: %s}", readonly, at))
	n.fails(t, 3, "read_only", "unlock")
	n.configure(t, fmt.Sprintf("{id: v-odd, device: %s, filesystem: ext4, no_mmp: true, mount: %s, options: [ro]}", readonly, at))
	n.must(t, "unlock")
	holds(t, filepath.Join(at, "note"), "kept")
	if err := os.WriteFile(filepath.Join(at, "more"), nil, 0o600); err == nil {
		t.Error("a read-only volume was written")
	}
	n.must(t, "close", "--all")

	plain := image(t, diskSize)
	n.configure(t, fmt.Sprintf("{id: v-file, device: %s, format: true}", plain))
	n.fails(t, 3, "disk or a partition", "unlock")
	if strings.Trim(string(peek(t, plain, 0, 1<<20)), "\x00") != "" {
		t.Error("a regular file was written to")
	}
	n.configure(t, fmt.Sprintf("{id: v-small, device: %s, format: true}", disk(t, 16<<20)))
	n.fails(t, 3, "17 MiB", "unlock")
	// Neither is known to the key service, as one that is being made.
	for _, id := range []string{"v-file", "v-small"} {
		if _, err := os.Stat(filepath.Join(n.world.dir, "records/volumes", id+".obj")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s has a record: %v", id, err)
		}
	}
}

// Case 55: a disk that does not answer stops no other volume, and no SIGTERM.
func TestDiskAHungDiskStopsNothingElse(t *testing.T) {
	n := first(t)
	good, bad, at := disk(t, diskSize), disk(t, diskSize), mountPoint(t, "good")
	removed(t, "v-good", "v-hung", "below", "v-other")
	sectors := diskSize / 512
	tool(t, "dmsetup", "create", "below", "--table", fmt.Sprintf("0 %d linear %s 0", sectors, bad))
	tool(t, "dmsetup", "mknodes")
	n.configure(t, fmt.Sprintf("{id: v-hung, device: /dev/mapper/below, format: true}"))
	n.must(t, "unlock")
	n.must(t, "close", "--all")
	check(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
	tool(t, "dmsetup", "suspend", "--noflush", "below")
	resume := func() { tool(t, "dmsetup", "resume", "below") }
	t.Cleanup(func() { _ = exec.Command("dmsetup", "resume", "below").Run() }) // or what fails here hangs all that follow
	n.configure(t,
		"{id: v-hung, device: /dev/mapper/below, optional: true}",
		fmt.Sprintf("{id: v-good, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", good, at))
	began := time.Now()
	a := n.start(t)
	a.waitFor(t, "msg=ready")
	if !mounted(at) {
		t.Error("the good volume is not mounted")
	}
	t.Logf("ready after %v", time.Since(began))
	a.waitFor(t, "does not answer")
	n.must(t, "close", "v-good")
	n.must(t, "unlock", "v-good")
	a.terminate(t)
	resume()
	n.must(t, "close", "--all")
}

// A disk that comes late is opened when it comes; an optional one delays nobody.
func TestDiskALateDiskIsOpenedWhenItComes(t *testing.T) {
	n := first(t)
	device, at := n.one(t, "v-late")
	link := filepath.Join(n.dir, "by-id")
	n.configure(t, fmt.Sprintf("{id: v-late, device: %s, filesystem: ext4, no_mmp: true, mount: %s, optional: true}", link, at))
	began := time.Now()
	a := n.start(t)
	a.waitFor(t, "msg=ready")
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("ready after %v", took)
	}
	if out := n.must(t, "status"); !strings.Contains(out, "failed") || !strings.Contains(out, "not there") {
		t.Errorf("status says\n%s", out)
	}
	check(t, os.Symlink(device, link))
	a.waitFor(t, "a volume is open after all")
	holds(t, filepath.Join(at, "note"), "kept")
	n.must(t, "close", "v-late")
}
