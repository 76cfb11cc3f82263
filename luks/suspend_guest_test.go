//go:build umlguest

package luks

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"
)

func TestLiveASuspendedMappingHasNoKeyAndGoesOnWithIt(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	m := v.mustOpen(t, "data")
	run(t, "mkfs.ext4", "-q", m.Path)
	dir := t.TempDir()
	run(t, "mount", m.Path, dir)
	defer run(t, "umount", dir)
	must(t, os.WriteFile(dir+"/file", []byte("before"), 0o600))
	wantError(t, Suspend(ctx, "data", idLogs.UUID), ErrNameTaken)
	must(t, Suspend(ctx, "data", v.id.UUID))
	must(t, Suspend(ctx, "data", v.id.UUID))
	if table := run(t, "dmsetup", "table", "data"); strings.Contains(table, "logon") {
		t.Errorf("the key was not wiped: %s", table)
	}
	status, err := Status(ctx, "data")
	must(t, err)
	if !status.Suspended {
		t.Errorf("mapping is %+v", status)
	}
	_, err = v.open("data")
	wantError(t, err, ErrSuspended)

	wrote := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(dir+"/more", os.O_CREATE|os.O_WRONLY|os.O_SYNC, 0o600)
		if err == nil {
			_, err = f.WriteString("while it was suspended")
			f.Close()
		}
		wrote <- err
	}()
	select {
	case err := <-wrote:
		t.Errorf("a suspended mapping let a write through: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	_, err = Resume(ctx, v.existing("data"), logsKey(t))
	wantError(t, err, ErrHeaderMAC)
	again, err := Resume(ctx, v.existing("data"), v.dek)
	must(t, err)
	must(t, <-wrote)
	if again.Suspended || again.Device != m.Device {
		t.Errorf("mapping is %+v", again)
	}
	_, err = Resume(ctx, v.existing("data"), v.dek)
	must(t, err)
	if text, err := os.ReadFile(dir + "/file"); err != nil || string(text) != "before" {
		t.Errorf("file holds %q, %v", text, err)
	}
	keys, err := os.ReadFile("/proc/keys")
	must(t, err)
	for line := range strings.Lines(string(keys)) {
		if strings.Contains(line, "cryptsetup:") && !strings.HasPrefix(strings.Fields(line)[1], "IR") {
			t.Errorf("a keyring holds a volume key: %s", line)
		}
	}
}
