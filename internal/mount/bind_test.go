package mount

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
)

// memory mounts a filesystem in memory, and returns it as a source.
func memory(t *testing.T, path string) Source {
	t.Helper()
	must(t, os.MkdirAll(path, 0o755))
	if err := unix.Mount("tmp", path, "tmpfs", unix.MS_NOSUID, "size=1m"); err != nil {
		t.Fatalf("%v (hint: the tests run as root and mount, see the README)", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	return Source{Path: path, Device: st.Dev}
}

func TestAFolderIsShownElsewhere(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	source, other := memory(t, at("stage")), memory(t, at("other"))
	must(t, os.Mkdir(at("cut"), 0o755))
	must(t, os.WriteFile(at("stage/note"), []byte("x"), 0o600))
	for range 2 { // again is the same
		must(t, BindFolder(source, at("pod/rw"), []string{"noexec", "suid", "data=ordered"}))
		must(t, BindFolder(source, at("pod/ro"), []string{"ro"}))
	}
	t.Cleanup(func() { _, _ = Clear(at("pod/rw")), Clear(at("pod/ro")) })
	must(t, os.WriteFile(at("pod/rw/more"), nil, 0o600))
	if err := os.WriteFile(at("pod/ro/more"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("a read-only mount is written: %v", err)
	}
	var st unix.Statfs_t
	must(t, unix.Statfs(at("pod/rw"), &st))
	if st.Flags&unix.ST_NOEXEC == 0 || st.Flags&unix.ST_NOSUID == 0 {
		t.Errorf("flags are %#x: rights came back, or stayed", st.Flags)
	}
	all, err := Table()
	must(t, err)
	points, err := Points(source.Device)
	must(t, err)
	slices.Sort(points)
	if want := []string{at("pod/ro"), at("pod/rw"), at("stage")}; !slices.Equal(points, want) {
		t.Errorf("it is shown at %q", points)
	}
	mounts := 0
	for _, e := range all {
		if strings.HasPrefix(e.Point, at("pod")) {
			mounts++
		}
	}
	if mounts != 2 {
		t.Errorf("%d mounts", mounts)
	}
	for name, err := range map[string]error{
		"the right to write": BindFolder(source, at("pod/ro"), nil), "another device there": BindFolder(source, at("other"), nil),
		"another device here": BindFolder(Source{Path: at("stage"), Device: other.Device}, at("pod/new"), nil),
	} {
		if failure.Of(err).Class != failure.DeviceBusy {
			t.Errorf("%s: %v", name, err)
		}
	}
	// One that was cut off before its rights were taken away.
	must(t, unix.Mount(at("stage"), at("cut"), "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = Clear(at("cut")) })
	must(t, BindFolder(source, at("cut"), []string{"ro", "noexec"}))
	if err := os.WriteFile(at("cut/more"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("it is still written: %v", err)
	}
	must(t, Clear(at("pod/rw")))
	must(t, Clear(at("pod/rw")))
	if _, err := os.Stat(at("pod/rw")); !errors.Is(err, os.ErrNotExist) {
		t.Error("the folder is left")
	}
	if _, err := os.Stat(at("stage/more")); err != nil {
		t.Error("what was shown is gone")
	}
}

func TestADeviceIsShownElsewhere(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	// The number of a driver for which there is no device is enough: nobody opens it.
	number, other := unix.Mkdev(240, 7), unix.Mkdev(240, 8)
	must(t, unix.Mknod(at("node"), unix.S_IFBLK|0o600, int(number)))
	source := Source{Path: at("node"), Device: number}
	for range 2 {
		must(t, BindDevice(source, at("pod/device")))
	}
	t.Cleanup(func() { _ = Clear(at("pod/device")) })
	if Number(at("pod/device")) != number {
		t.Error("it is another device")
	}
	if n, err := DeviceAt(at("pod/device")); n != 0 || err != nil {
		t.Errorf("a device that the kernel has not is %d, %v", n, err)
	}
	must(t, os.Mkdir(at("folder"), 0o755))
	must(t, os.Symlink("/etc/passwd", at("link")))
	for name, err := range map[string]error{
		"another device there": BindDevice(Source{Path: at("node"), Device: other}, at("pod/device")), "another node": BindDevice(Source{Path: at("node"), Device: other}, at("pod/new")),
		"a folder": BindDevice(source, at("folder")), "a link": BindDevice(source, at("link")),
	} {
		if failure.Of(err).Class != failure.DeviceBusy {
			t.Errorf("%s: %v", name, err)
		}
	}
	// As a driver does that publishes without a look.
	must(t, unix.Mount(at("node"), at("pod/device"), "", unix.MS_BIND, ""))
	must(t, Clear(at("pod/device")))
	if _, err := os.Lstat(at("pod/device")); !errors.Is(err, os.ErrNotExist) {
		t.Error("something is left")
	}
}

func TestWhatWasWrittenToABarePathStays(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.WriteFile(at("file"), []byte("data"), 0o600))
	must(t, os.MkdirAll(at("folder/inside"), 0o700))
	for _, name := range []string{"file", "folder"} {
		if err := Clear(at(name)); err == nil {
			t.Errorf("%s was removed", name)
		}
		if _, err := os.Stat(at(name)); err != nil {
			t.Error(err)
		}
	}
	_ = memory(t, at("folder/inside"))
	if err := Remove(at("folder")); !errors.Is(err, ErrBusy) {
		t.Errorf("a folder with a mount in it: %v", err)
	}
	must(t, Clear(at("folder/inside")))
	must(t, os.WriteFile(at("folder/of-a-driver"), []byte("x"), 0o600))
	for range 2 {
		must(t, Remove(at("folder")))
	}
	if _, err := os.Stat(at("folder")); !errors.Is(err, os.ErrNotExist) {
		t.Error("the folder is left")
	}
	for _, name := range []string{"nothing", "no/folder/of/it"} {
		must(t, Clear(at(name)))
	}
	if n, err := DeviceAt(at("nothing")); n != 0 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := DeviceAt(at("file")); n != 0 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}
