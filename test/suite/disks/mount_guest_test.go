//go:build umlguest

package disks

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Case 49: mount points inside each other, in either order of the file, with the
// outer disk late.
func TestDiskNestedMountPointsComeUpInOrder(t *testing.T) {
	n := first(t)
	outer, inner := disk(t, diskSize), disk(t, diskSize)
	at := mountPoint(t, "m")
	sub := filepath.Join(at, "sub")
	removed(t, "v-inner", "v-outer")
	late := filepath.Join(n.dir, "late")
	n.configure(t,
		fmt.Sprintf("{id: v-inner, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", inner, sub),
		fmt.Sprintf("{id: v-outer, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", late, at))
	done := make(chan error, 1)
	go func() {
		cmd := n.command("unlock")
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		done <- err
	}()
	eventually(t, "it waits for the outer disk", func() bool { return !mapped("v-inner") })
	check(t, os.Symlink(outer, late))
	check(t, <-done)
	put(t, filepath.Join(sub, "in-sub"), "of sub")
	put(t, filepath.Join(at, "in-m"), "of m")
	n.fails(t, 10, "is mounted inside it", "close", "v-outer")
	if !mounted(at) {
		t.Error("the outer one was unmounted")
	}
	n.must(t, "close", "--all")
	n.must(t, "unlock")
	holds(t, filepath.Join(sub, "in-sub"), "of sub")
	holds(t, filepath.Join(at, "in-m"), "of m")
	n.must(t, "close", "v-inner")
	if _, err := os.Stat(filepath.Join(sub, "in-sub")); err == nil {
		t.Error("the inner file is on the outer disk")
	}
	n.must(t, "close", "v-outer")
	n.configure(t,
		fmt.Sprintf("{id: v-a, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", inner, sub),
		fmt.Sprintf("{id: v-b, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}", outer, sub))
	n.fails(t, 3, "is used twice", "agent", "--config", "agent.yaml", "--check")
}

// Case 49: a mount target that is a link, or becomes one.
func TestDiskAMountTargetIsNoLinkOfSomebodyElse(t *testing.T) {
	n := first(t)
	device, at := n.one(t, "v-link")
	dir := filepath.Dir(at)
	configure := func(mount string) {
		n.configure(t, fmt.Sprintf("{id: v-link, device: %s, filesystem: ext4, no_mmp: true, mount: %s}", device, mount))
	}
	// A user owns the parent, and leads it elsewhere.
	theirs, etc := filepath.Join(dir, "theirs"), filepath.Join(dir, "etc")
	check(t, os.MkdirAll(theirs, 0o755))
	check(t, os.MkdirAll(etc, 0o755))
	check(t, os.Symlink(etc, filepath.Join(theirs, "data")))
	check(t, os.Chown(theirs, 1000, 1000))
	check(t, os.Lchown(filepath.Join(theirs, "data"), 1000, 1000))
	configure(filepath.Join(theirs, "data"))
	n.fails(t, 3, "not safe", "unlock", "v-link")
	if mounted(etc) {
		t.Error("the volume is mounted where the user wanted")
	}
	// Root's own link is resolved once, and found again.
	check(t, os.MkdirAll(filepath.Join(dir, "var/mnt"), 0o755))
	check(t, os.Symlink("var/mnt", filepath.Join(dir, "mnt")))
	configure(filepath.Join(dir, "mnt/data"))
	real := filepath.Join(dir, "var/mnt/data")
	t.Cleanup(func() { _ = exec.Command("umount", real).Run() })
	n.must(t, "unlock", "v-link")
	n.must(t, "unlock", "v-link")
	if out := n.must(t, "status"); !strings.Contains(out, real) {
		t.Errorf("status says\n%s", out)
	}
	holds(t, filepath.Join(real, "note"), "kept")
	n.must(t, "close", "v-link")
	if mounted(real) {
		t.Error("it is still mounted")
	}
	// A foreign node in the mapper's place.
	configure("")
	n.configure(t, fmt.Sprintf("{id: v-link, device: %s}", device))
	n.must(t, "unlock", "v-link")
	foreign := disk(t, diskSize)
	tool(t, "mkfs.ext4", "-q", foreign)
	check(t, os.Remove("/dev/mapper/v-link"))
	tool(t, "cp", "-a", foreign, "/dev/mapper/v-link")
	configure(real)
	n.fails(t, 10, "expected is", "unlock", "v-link")
	if mounted(real) {
		t.Error("a foreign disk is mounted in the volume's place")
	}
	check(t, os.Remove("/dev/mapper/v-link"))
	n.must(t, "close", "v-link")
}

// The unit's umask is not that of other people's folders.
func TestDiskParentsOfAMountPointAreForEverybody(t *testing.T) {
	n := first(t)
	device, _ := n.one(t, "v-umask")
	base := mountPoint(t, "srv")
	n.configure(t, fmt.Sprintf("{id: v-umask, device: %s, filesystem: ext4, no_mmp: true, mount: %s/app/data}", device, base))
	cmd := exec.Command("/bin/sh", "-c", "umask 077; exec \"$@\"", "sh", program(), "unlock", "--config", filepath.Join(n.dir, "agent.yaml"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, dir := range []string{base, base + "/app"} {
		if st := must[os.FileInfo](t)(os.Stat(dir)); st.Mode().Perm() != 0o755 {
			t.Errorf("%s has mode %v", dir, st.Mode())
		}
	}
	n.must(t, "close", "v-umask")
}

// Case 54: a close that cannot finish changes nothing, and names who is in the way.
func TestDiskACloseThatCannotFinishChangesNothing(t *testing.T) {
	n := first(t)
	device, at := n.one(t, "v-busy")
	n.must(t, "unlock", "v-busy")
	reader := exec.Command("sleep", "600")
	reader.Dir = at
	check(t, reader.Start())
	n.fails(t, 10, fmt.Sprintf("pid %d (sleep)", reader.Process.Pid), "close", "v-busy")
	still := func(why string) {
		t.Helper()
		if !mounted(at) || !mapped("v-busy") {
			t.Errorf("%s: mounted %v, mapped %v", why, mounted(at), mapped("v-busy"))
		}
		holds(t, filepath.Join(at, "note"), "kept")
	}
	still("a process sits in it")
	check(t, reader.Process.Kill())
	_ = reader.Wait()

	holder := exec.Command("/bin/sh", "-c", "exec 3</dev/mapper/v-busy; exec sleep 600")
	check(t, holder.Start())
	eventually(t, "the device is held", func() bool {
		link, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/3", holder.Process.Pid))
		return link == "/dev/mapper/v-busy" || strings.HasPrefix(link, "/dev/dm-")
	})
	n.fails(t, 10, fmt.Sprintf("pid %d", holder.Process.Pid), "close", "v-busy")
	still("a process holds the device")
	check(t, holder.Process.Kill())
	_ = holder.Wait()

	elsewhere := mountPoint(t, "elsewhere")
	check(t, os.MkdirAll(elsewhere, 0o755))
	tool(t, "mount", "--bind", at, elsewhere)
	n.fails(t, 10, elsewhere, "close", "v-busy")
	still("it is mounted elsewhere, too")
	tool(t, "umount", elsewhere)

	n.must(t, "close", "v-busy")
	n.configure(t, fmt.Sprintf("{id: v-busy, device: %s}", device))
	n.must(t, "unlock", "v-busy")
	tool(t, "dmsetup", "create", "v-above", "--table", "0 104 linear /dev/mapper/v-busy 0")
	removed(t, "v-above")
	n.fails(t, 10, "v-above", "close", "v-busy")
	tool(t, "dmsetup", "remove", "v-above")
	n.must(t, "close", "v-busy")
	n.configure(t, fmt.Sprintf("{id: v-busy, device: %s, filesystem: ext4, mount: %s}", device, at))
	n.must(t, "unlock", "v-busy")

	// A volume that nothing describes any more is closed as well.
	n.configure(t)
	n.must(t, "close", "v-busy")
	if mapped("v-busy") || mounted(at) {
		t.Error("it is still open")
	}
}
