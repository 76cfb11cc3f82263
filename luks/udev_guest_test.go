//go:build umlguest

package luks

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Where udev runs, it makes and removes the names, and knows the mapping when Open
// returns.
func TestLiveUdevKnowsTheMappingWhenItIsOpen(t *testing.T) {
	udevd := exec.Command("/lib/systemd/systemd-udevd", "--resolve-names=never")
	must(t, udevd.Start())
	defer func() {
		must(t, udevd.Process.Kill())
		_ = udevd.Wait()
		_ = os.RemoveAll("/run/udev")
	}()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(udevControl); err == nil {
			break
		}
	}
	v := newVolume(t, idData, dataKey(t))
	for range 3 {
		began := time.Now()
		m, err := v.open("data")
		must(t, err)
		t.Logf("opened in %v", time.Since(began))
		if link, err := os.Readlink(m.Path); err != nil || !strings.Contains(link, "dm-") {
			t.Errorf("%s leads to %q, %v: udev did not make it", m.Path, link, err)
		}
		info := run(t, "udevadm", "info", "--query=property", "--name", m.Path)
		for _, want := range []string{"DM_NAME=data", "DM_UUID=" + dmUUID(v.id.UUID, "data"), "DM_UDEV_PRIMARY_SOURCE_FLAG=1"} {
			if !strings.Contains(info, want) {
				t.Errorf("udev does not say %s:\n%s", want, info)
			}
		}
		run(t, "mkfs.ext4", "-q", alias(t, m.Path))
		must(t, Announce(m))
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			info = run(t, "udevadm", "info", "--query=property", "--name", m.Path)
			if strings.Contains(info, "ID_FS_TYPE=ext4") && !strings.Contains(info, "SYSTEMD_READY=0") {
				break
			}
			if time.Now().After(end) {
				t.Errorf("udev does not see a filesystem that was made:\n%s", info)
				break
			}
		}
		run(t, "udevadm", "settle")
		must(t, v.close("data"))
		if _, err := os.Lstat(m.Path); err == nil {
			t.Errorf("%s is there still", m.Path)
		}
	}
	if left, err := os.ReadFile("/proc/sysvipc/sem"); err == nil && strings.Count(string(left), "\n") > 1 {
		t.Errorf("semaphores are left:\n%s", left)
	}
}

// alias is another node of a device, whose writers udev does not see.
func alias(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	node := filepath.Join(t.TempDir(), "node")
	must(t, unix.Mknod(node, unix.S_IFBLK|0o600, int(st.Rdev)))
	return node
}
