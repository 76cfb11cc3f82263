package filesystem

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/failure"
)

// made makes a filesystem in a file.
func made(t *testing.T, fstype string, o Options) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fs.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 320<<20); err != nil {
		t.Fatal(err)
	}
	if err := Make(t.Context(), path, fstype, o); err != nil {
		t.Fatal(err)
	}
	return path
}

func debugfs(t *testing.T, path, command string) {
	t.Helper()
	if out, err := exec.Command("/usr/sbin/debugfs", "-w", "-R", command, path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func TestEachFilesystemIsMadeAndChecked(t *testing.T) {
	for fstype := range kinds {
		path := made(t, fstype, Options{Label: "keys"})
		if repaired, err := Check(t.Context(), path, fstype, false); repaired || err != nil {
			t.Errorf("%s: %v, %v", fstype, repaired, err)
		}
		out, err := exec.Command("blkid", "-p", "-o", "export", path).Output()
		if err != nil || !strings.Contains(string(out), "LABEL=keys") || !strings.Contains(string(out), "TYPE="+fstype) {
			t.Errorf("%s: %v: %s", fstype, err, out)
		}
	}
}

func TestOneWriterIsProtectedByTheFilesystem(t *testing.T) {
	for _, one := range []bool{true, false} {
		out, err := exec.Command("/usr/sbin/dumpe2fs", "-h", made(t, "ext4", Options{OneWriter: one})).Output()
		if err != nil || strings.Contains(string(out), " mmp") != one {
			t.Errorf("one writer %v: %v: %s", one, err, out)
		}
	}
}

// TestADamagedFilesystemIsRepairedOrNamed is case 52.
func TestADamagedFilesystemIsRepairedOrNamed(t *testing.T) {
	path := made(t, "ext4", Options{})
	if !cleanExt4(path) {
		t.Fatal("a new filesystem is not clean")
	}
	debugfs(t, path, "ssv state 2")
	debugfs(t, path, "ssv free_blocks_count 7")
	if cleanExt4(path) {
		t.Error("a filesystem with errors is clean")
	}
	if repaired, err := Check(t.Context(), path, "ext4", true); repaired || err != nil {
		t.Errorf("read-only: %v, %v", repaired, err)
	}
	if repaired, err := Check(t.Context(), path, "ext4", false); !repaired || err != nil {
		t.Errorf("%v, %v", repaired, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(strings.Repeat("x", 16<<10)), 0); err != nil {
		t.Fatal(err)
	}
	_, err = Check(t.Context(), path, "ext4", false)
	if !errors.Is(err, ErrNeedsRepair) || failure.Of(err).Class != failure.NeedsRepair || !strings.Contains(failure.Of(err).Hint, "e2fsck -f "+path) {
		t.Errorf("%v", err)
	}
}

func TestErrorsMakeAFilesystemReadOnlyByDefault(t *testing.T) {
	if got := strings.Join(MountOptions("ext4", []string{"nosuid"}), ","); got != "nosuid,errors=remount-ro" {
		t.Error(got)
	}
	if got := strings.Join(MountOptions("ext4", []string{"errors=panic"}), ","); got != "errors=panic" {
		t.Error(got)
	}
	if got := strings.Join(MountOptions("xfs", nil), ","); got != "" {
		t.Error(got)
	}
}

func FuzzSuperblock(f *testing.F) {
	f.Add(make([]byte, superblockSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if parseClean(b) && len(b) != superblockSize {
			t.Errorf("%d bytes", len(b))
		}
	})
}
