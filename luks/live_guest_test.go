//go:build umlguest

package luks

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestLiveVolumeKeepsItsData(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	m := v.mustOpen(t, "data")
	run(t, "mkfs.ext4", "-q", "-O", "^has_journal", m.Path)
	dir := t.TempDir()
	text := bytes.Repeat([]byte("a line of plaintext that must not be found on the disk\n"), 1000)
	run(t, "mount", m.Path, dir)
	must(t, os.WriteFile(filepath.Join(dir, "file"), text, 0o600))
	wantError(t, v.close("data"), ErrDeviceBusy)
	run(t, "umount", dir)
	must(t, v.close("data"))
	_, err := Status(ctx, "data")
	wantError(t, err, ErrNotActive)
	wantError(t, v.close("data"), ErrNotActive)

	raw, err := os.ReadFile(v.device)
	must(t, err)
	if bytes.Contains(raw, text[:55]) {
		t.Error("plaintext is on the disk")
	}
	m = v.mustOpen(t, "data")
	run(t, "mount", "-o", "ro", m.Path, dir)
	got, err := os.ReadFile(filepath.Join(dir, "file"))
	run(t, "umount", dir)
	if err != nil || !bytes.Equal(got, text) {
		t.Errorf("the file is not what was written: %v", err)
	}
}

func TestLiveVolumeOpensWithTheStockTool(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	run(t, "cryptsetup", "open", "--key-file", keyFile(t, v.dek), v.device, "stock")
	run(t, "cryptsetup", "close", "stock")
	v.mustOpen(t, "data")
}

func TestLiveOpenIsIdempotent(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	first := v.mustOpen(t, "data")
	again, err := v.open("data")
	must(t, err)
	if first != again {
		t.Errorf("mapping was %+v, is %+v", first, again)
	}
	st, err := Status(context.Background(), "data")
	must(t, err)
	if st != first {
		t.Errorf("status is %+v, want %+v", st, first)
	}
	if first.Bytes != deviceSize-dataOffset || first.ReadOnly || first.Discards || first.Workqueues || first.InUse || first.UUID != v.id.UUID {
		t.Errorf("mapping is %+v", first)
	}
}

func TestLiveNameIsOneVolumesOnly(t *testing.T) {
	data, logs := newVolume(t, idData, dataKey(t)), newVolume(t, idLogs, logsKey(t))
	data.mustOpen(t, "data")
	_, err := logs.open("data")
	wantError(t, err, ErrNameTaken)

	// The same volume's clone on another disk has the same UUID.
	clone := data
	clone.device = blankDevice(t, deviceSize)
	patch(t, clone.device, data.header(t), 0)
	_, err = clone.open("data")
	wantError(t, err, ErrNameTaken)
	_, err = data.open("data2")
	wantError(t, err, ErrDeviceBusy)
}

func TestLiveForeignMappingIsNeitherOpenedNorClosed(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	run(t, "dmsetup", "create", "foreign", "--table", "0 100 zero")
	defer run(t, "dmsetup", "remove", "foreign")
	_, err := v.open("foreign")
	wantError(t, err, ErrNameTaken)
	wantError(t, v.close("foreign"), ErrNameTaken)
	_, err = Status(ctx, "foreign")
	wantError(t, err, ErrNameTaken)
}

func TestLiveTableThatIsNotOursIsAMismatch(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	uuid := dmUUID(v.id.UUID, "data")
	for name, table := range map[string]string{
		"a linear target":    fmt.Sprintf("0 100 linear %s 32768", v.device),
		"a null cipher":      fmt.Sprintf("0 8192 crypt cipher_null-ecb - 0 %s 32768 1 sector_size:4096", v.device),
		"a key in the table": fmt.Sprintf("0 8192 crypt aes-xts-plain64 %s 0 %s 32768 1 sector_size:4096", strings.Repeat("0123456789abcdef", 8), v.device),
		"two targets":        fmt.Sprintf("0 100 linear %s 32768\n100 100 linear %s 32868", v.device, v.device),
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "table")
			must(t, os.WriteFile(file, []byte(table+"\n"), 0o600))
			run(t, "dmsetup", "create", "data", "-u", uuid, file)
			defer run(t, "dmsetup", "remove", "data")
			_, err := v.open("data")
			wantError(t, err, ErrTableMismatch)
			if strings.Contains(err.Error(), "0123456789abcdef") {
				t.Errorf("error shows a key: %v", err)
			}
			_, err = Status(context.Background(), "data")
			wantError(t, err, ErrTableMismatch)
			t.Log(err)
		})
	}
}

func TestLiveOptionsReachTheKernelAndAreReadBack(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	for _, o := range []OpenOptions{{}, {ReadOnly: true}, {AllowDiscards: true}, {Workqueues: true}, {ReadOnly: true, AllowDiscards: true, Workqueues: true}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			m, err := v.openWith("data", o)
			must(t, err)
			defer v.close("data")
			if m.ReadOnly != o.ReadOnly || m.Discards != o.AllowDiscards || m.Workqueues != o.Workqueues {
				t.Errorf("mapping is %+v", m)
			}
			t.Log(run(t, "dmsetup", "table", "data"))
		})
	}
}

func TestLiveVolumeKeyStaysInNoKeyring(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	_, err := v.open("data")
	must(t, err)
	defer v.close("data")
	keys, err := os.ReadFile("/proc/keys")
	must(t, err)
	for line := range strings.Lines(string(keys)) {
		// A revoked key has no content any more, and is listed until the kernel
		// has collected it.
		if strings.Contains(line, "cryptsetup:") && !strings.HasPrefix(strings.Fields(line)[1], "IR") {
			t.Errorf("a keyring holds a volume key: %s", line)
		}
	}
	if table := run(t, "dmsetup", "table", "--showkeys", "data"); !strings.Contains(table, ":64:logon:cryptsetup:"+v.id.UUID+"-d0") {
		t.Errorf("table is %s", table)
	}
}

func TestLiveVolumesOpenConcurrently(t *testing.T) {
	volumes := []volume{newVolume(t, idData, dataKey(t)), newVolume(t, idLogs, logsKey(t))}
	for round := range 5 {
		var wg sync.WaitGroup
		for i, v := range volumes {
			for range 4 { // four callers want the same volume
				wg.Go(func() {
					if _, err := v.open(fmt.Sprintf("v%d", i)); err != nil {
						t.Errorf("round %d: %v", round, err)
					}
				})
			}
		}
		wg.Wait()
		for i, v := range volumes {
			wg.Go(func() {
				if err := v.close(fmt.Sprintf("v%d", i)); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			})
		}
		wg.Wait()
	}
}

func TestLiveDeviceInUseIsNotFormatted(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	v.mustOpen(t, "data")
	wantError(t, untouched(t, v.device, func() error {
		_, err := formatDevice(v.device, v.id, v.dek)
		return err
	}), ErrDeviceBusy)
}

func TestLiveMappingThatIsHeldIsBusy(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	m := v.mustOpen(t, "data")
	f, err := os.Open(m.Path)
	must(t, err)
	wantError(t, v.close("data"), ErrDeviceBusy)
	must(t, f.Close())
	must(t, v.close("data"))
}

// A claim that ends soon is waited for: a program between fork and exec has copies of what
// this process has closed. One that lasts is in the way.
func TestLiveAClaimIsWaitedForAMoment(t *testing.T) {
	device := blankDevice(t, 20<<20)
	claim := func() int {
		fd, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		must(t, err)
		return fd
	}
	fd := claim()
	go func() {
		time.Sleep(4 * claimPause)
		unix.Close(fd)
	}()
	d, err := openExclusive(t.Context(), device)
	must(t, err)
	d.Close()
	defer unix.Close(claim())
	_, err = openExclusive(t.Context(), device)
	wantError(t, err, ErrDeviceBusy)
}
