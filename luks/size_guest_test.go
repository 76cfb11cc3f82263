//go:build umlguest

package luks

import (
	"context"
	"errors"
	"os"
	"testing"
)

// resizeDevice changes the size of a loop device's file.
func resizeDevice(t testing.TB, device string, size int64) {
	t.Helper()
	must(t, os.Truncate(run(t, "losetup", "-n", "-O", "BACK-FILE", device), size))
	run(t, "losetup", "-c", device)
}

// A volume on a disk that the host has cut short is an error while its header does not
// fit, and opens on any size from then on, rounded down to 4096 bytes.
func TestLiveDiskOfAnotherSize(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	resizeDevice(t, v.device, dataOffset)
	wantError(t, untouched(t, v.device, func() error { _, err := v.open("data"); return err }), ErrDeviceSize)
	for size, want := range map[int64]int64{
		deviceSize - sectorSize:   deviceSize - dataOffset - dataSectorSize,
		deviceSize:                deviceSize - dataOffset,
		deviceSize + 7*sectorSize: deviceSize - dataOffset, // as sgdisk's last partition
		deviceSize + 9*sectorSize: deviceSize - dataOffset + dataSectorSize,
	} {
		resizeDevice(t, v.device, size)
		m, err := v.open("data")
		must(t, err)
		if m.Bytes != want {
			t.Errorf("device of %d bytes: mapping has %d, want %d", size, m.Bytes, want)
		}
		must(t, v.close("data"))
	}
}

func TestLiveADeviceOfAnOddSizeIsFormattedAndOpened(t *testing.T) {
	v := volume{device: blankDevice(t, deviceSize+7*sectorSize), id: idData, dek: dataKey(t)}
	h, err := formatDevice(v.device, v.id, v.dek)
	must(t, err)
	v.macs = h.MACs()
	if m := v.mustOpen(t, "data"); m.Bytes != deviceSize-dataOffset {
		t.Errorf("mapping has %d bytes", m.Bytes)
	}
}

func TestLiveAReadOnlyDeviceOpensReadOnly(t *testing.T) {
	v := newVolume(t, idData, dataKey(t))
	run(t, "blockdev", "--setro", v.device)
	defer run(t, "blockdev", "--setrw", v.device)
	_, err := v.open("data")
	wantError(t, err, ErrReadOnlyDevice)
	_, err = formatDevice(v.device, v.id, v.dek)
	wantError(t, err, ErrReadOnlyDevice)
	m, err := v.openWith("data", OpenOptions{ReadOnly: true})
	must(t, err)
	defer v.close("data")
	if !m.ReadOnly {
		t.Errorf("mapping is %+v", m)
	}
	if f, err := os.OpenFile(m.Path, os.O_WRONLY, 0); err == nil {
		_, err = f.Write(make([]byte, dataSectorSize))
		if errors.Join(err, f.Sync(), f.Close()) == nil {
			t.Error("a read-only mapping can be written to")
		}
	}
}

func TestLiveAMappingGrowsWhileItIsInUse(t *testing.T) {
	ctx := context.Background()
	v := newVolume(t, idData, dataKey(t))
	m := v.mustOpen(t, "data")
	run(t, "mkfs.ext4", "-q", m.Path)
	dir := t.TempDir()
	run(t, "mount", m.Path, dir)
	defer run(t, "umount", dir)
	must(t, os.WriteFile(dir+"/file", []byte("before"), 0o600))

	same, err := Resize(ctx, v.existing("data"), v.dek)
	must(t, err)
	if same.Bytes != m.Bytes {
		t.Errorf("a device of the same size made %d bytes of %d", same.Bytes, m.Bytes)
	}
	resizeDevice(t, v.device, 2*deviceSize+3*sectorSize)
	grown, err := Resize(ctx, v.existing("data"), v.dek)
	must(t, err)
	if grown.Bytes != 2*deviceSize-dataOffset || grown.Device != m.Device {
		t.Errorf("mapping is %+v, was %+v", grown, m)
	}
	run(t, "resize2fs", m.Path)
	must(t, os.WriteFile(dir+"/more", make([]byte, 8<<20), 0o600))
	run(t, "sync", "-f", dir)
	if text, err := os.ReadFile(dir + "/file"); err != nil || string(text) != "before" {
		t.Errorf("file holds %q, %v", text, err)
	}
	_, err = Resize(ctx, Existing{Device: v.device, Name: "data", Identity: v.id, MACs: v.macs}, logsKey(t))
	wantError(t, err, ErrHeaderMAC)

	resizeDevice(t, v.device, deviceSize)
	_, err = Resize(ctx, v.existing("data"), v.dek)
	wantError(t, err, ErrShrink)
	resizeDevice(t, v.device, 2*deviceSize)
}
