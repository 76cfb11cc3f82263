package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOptionsAreSplitAsMountDoes(t *testing.T) {
	bits, data := parse([]string{"nosuid", "nodev", "dev", "noatime", "data=ordered", "nofail", "x-systemd.automount", "ro", "rw", "discard", "defaults"})
	if bits != unix.MS_NOSUID|unix.MS_NOATIME || data != "data=ordered,discard" {
		t.Errorf("%#x, %q", bits, data)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestAPlaceIsReachedWithoutAnybodysLinks is case 49.
func TestAPlaceIsReachedWithoutAnybodysLinks(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("only root can give folders away (hint: the tests run as root, see the README)")
	}
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	at := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.MkdirAll(at("var/mnt"), 0o755))
	must(t, os.Symlink("var/mnt", at("mnt")))
	must(t, os.Symlink(at("var"), at("absolute")))
	must(t, os.Symlink("loop", at("loop")))
	must(t, os.Mkdir(at("open"), 0o777))
	must(t, os.Chmod(at("open"), 0o777))
	must(t, os.Symlink("/etc", at("open/link")))
	must(t, os.Mkdir(at("theirs"), 0o755))
	must(t, os.Symlink("/etc", at("theirs/link")))
	must(t, os.Chown(at("theirs"), 1000, 1000))
	must(t, os.Symlink("/etc", at("given")))
	must(t, os.Lchown(at("given"), 1000, 1000))
	must(t, os.WriteFile(at("file"), nil, 0o644))
	for path, want := range map[string]string{
		"var/mnt": "var/mnt", "mnt": "var/mnt", "mnt/new/deeper": "var/mnt/new/deeper", "absolute/mnt": "var/mnt", "var/../mnt": "var/mnt",
	} {
		p, err := Find(at(path), true)
		if err != nil || p.Path != at(want) {
			t.Errorf("%s: %+v, %v", path, p, err)
			continue
		}
		must(t, p.Close())
	}
	for path, want := range map[string]error{"open/link": ErrLink, "theirs/link": ErrLink, "given": ErrLink, "loop": nil, "file": nil, "file/x": nil} {
		p, err := Find(at(path), true)
		if err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("%s: %+v, %v", path, p, err)
		}
	}
	if _, err := Find(at("nothing"), false); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	old := unix.Umask(0o077)
	p, err := Find(at("masked/deeper"), true)
	unix.Umask(old)
	must(t, err)
	defer p.Close()
	if st, err := os.Stat(at("masked")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	open, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", os.Getpid()))
	leaks := 0
	for _, fd := range open {
		if to, _ := os.Readlink(fd); strings.HasPrefix(to, dir) && to != p.Path {
			leaks++
		}
	}
	if leaks > 0 {
		t.Errorf("%d descriptors are left", leaks)
	}
}

func TestMountinfoIsReadStrictly(t *testing.T) {
	const text = `24 30 0:22 / /proc rw,nosuid shared:12 - proc proc rw
30 1 254:0 / / rw,relatime shared:1 - ext4 /dev/mapper/root rw,errors=remount-ro
77 30 0:51 / /srv/a\040b\134c rw - btrfs /dev/mapper/b rw
`
	all, err := parseTable(strings.NewReader(text))
	if err != nil || len(all) != 3 || all[2].Point != `/srv/a b\c` || all[2].Type != "btrfs" || all[1].Device != unix.Mkdev(254, 0) {
		t.Errorf("%+v, %v", all, err)
	}
	for _, bad := range []string{"24 30 0:22 / /proc rw", "24 30 x:22 / /proc rw - proc proc rw", "a - b"} {
		if _, err := parseTable(strings.NewReader(bad + "\n")); !errors.Is(err, errMountinfo) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func FuzzMountinfo(f *testing.F) {
	f.Add([]byte(`24 30 0:22 / /proc rw,nosuid shared:12 - proc proc rw`))
	f.Fuzz(func(t *testing.T, line []byte) {
		if e, err := parseLine(line); err == nil && e.Type == "" {
			t.Errorf("%q", line)
		}
	})
}

func TestAHolderIsNamed(t *testing.T) {
	var st unix.Stat_t
	must(t, unix.Stat("/proc/self/exe", &st))
	// This process has a file of that device in its memory, and so have others; it
	// never names itself.
	for _, h := range Holders(Source{Device: 1}, filepath.Dir(must2(os.Readlink("/proc/self/exe")))) {
		if strings.Contains(h, fmt.Sprintf("pid %d ", os.Getpid())) {
			t.Error(h)
		}
	}
}

func must2(s string, _ error) string { return s }
