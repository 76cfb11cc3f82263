package agent

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
)

// image makes an ext4 filesystem in a file.
func image(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fs.img")
	if err := os.WriteFile(path, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	tool, err := lookPath("mke2fs")
	if err != nil {
		t.Fatalf("%v (hint: make deps)", err)
	}
	if out, err := exec.Command(tool, "-q", "-F", "-t", "ext4", path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

func TestARealSuperblockIsRead(t *testing.T) {
	path := image(t)
	sb, found, err := readSuperblock(path)
	if err != nil || !found || sb.everMounted {
		t.Fatalf("%+v, %v, %v", sb, found, err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := superblockAt; i < superblockAt+superblockSize; i += 17 {
		data[i] ^= 1
		if _, ok := parseSuperblock(data[superblockAt : superblockAt+superblockSize]); ok {
			t.Errorf("a superblock with a changed byte %d counts", i)
		}
		data[i] ^= 1
	}
}

func TestAFilesystemThatWasInUseIsNeverMadeAgain(t *testing.T) {
	path := image(t)
	mark := exec.Command("/usr/sbin/debugfs", "-w", "-R", "set_super_value mnt_count 1", path)
	if out, err := mark.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	err = makeFilesystem(t.Context(), path)
	if f := failure.Of(err); f.Class != failure.Tampered || !strings.Contains(f.Hint, "rolled back") {
		t.Fatalf("got %v", err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Fatal("the filesystem was changed")
	}
}

func TestAnInterruptedFilesystemIsMadeAgain(t *testing.T) {
	path := image(t)
	if err := makeFilesystem(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if sb, found, err := readSuperblock(path); err != nil || !found || sb.everMounted {
		t.Fatalf("%+v, %v, %v", sb, found, err)
	}
}

func TestMountOptionsAreAClosedSet(t *testing.T) {
	if _, err := mountFlags([]string{"nosuid", "nodev", "noatime"}); err != nil {
		t.Error(err)
	}
	for _, o := range []string{"suid", "", "nosuid,nodev", "data=journal"} {
		if _, err := mountFlags([]string{o}); err == nil {
			t.Errorf("%q was accepted", o)
		}
	}
}

func FuzzSuperblock(f *testing.F) {
	data, err := os.ReadFile(image(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data[superblockAt : superblockAt+superblockSize])
	f.Add(make([]byte, superblockSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, ok := parseSuperblock(b); ok && binary.LittleEndian.Uint16(b[offMagic:]) != ext4Magic {
			t.Fatal("accepted without its magic number")
		}
	})
}

// TestOnlyOurOwnMountIsTakenOff needs root, as every test run does.
func TestOnlyOurOwnMountIsTakenOff(t *testing.T) {
	target := t.TempDir()
	if err := unix.Mount("tmpfs", target, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatalf("mount a tmpfs: %v (hint: run the tests as root)", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(target, 0) })
	if err := unmount("/dev/null", target); err != nil {
		t.Fatal(err)
	}
	if n, err := mountedAt(target); err != nil || n == nil {
		t.Fatalf("what somebody else mounted is gone, %v", err)
	}
	if err := mount("/dev/null", target, nil); failure.Of(err).Class != failure.DeviceBusy {
		t.Fatalf("mounted over it: %v", err)
	}
}
