//go:build umlguest

package luks

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// sharedDisk makes one SCSI disk that two initiators see, each as a device of its own:
// the kernel's own target over a file.
func sharedDisk(t *testing.T) (a, b string) {
	t.Helper()
	set := func(path, value string) { must(t, os.WriteFile(path, []byte(value), 0o200)) }
	run(t, "/run/modprobe", "target_core_mod")
	if _, err := os.Stat("/sys/kernel/config/target"); err != nil {
		run(t, "mount", "-t", "configfs", "configfs", "/sys/kernel/config")
	}
	// Reservations that survive the loss of power are kept in a file.
	kept := t.TempDir()
	must(t, os.Mkdir(kept+"/pr", 0o755))
	set("/sys/kernel/config/target/dbroot", kept)
	for _, module := range []string{"target_core_file", "tcm_loop", "sd_mod"} {
		run(t, "/run/modprobe", module)
	}
	core := "/sys/kernel/config/target/core/fileio_0/shared"
	must(t, os.MkdirAll(core, 0o755))
	set(core+"/control", fmt.Sprintf("fd_dev_name=%s,fd_dev_size=%d", image(t, deviceSize), deviceSize))
	set(core+"/enable", "1")
	set(core+"/wwn/vpd_unit_serial", "keyagent-test")
	var devices []string
	for i := range 2 {
		before := disks(t)
		target := fmt.Sprintf("/sys/kernel/config/target/loopback/naa.600140500000000%d/tpgt_1", i)
		must(t, os.MkdirAll(target+"/lun/lun_0", 0o755))
		set(target+"/nexus", fmt.Sprintf("naa.600140500000001%d", i))
		must(t, os.Symlink(core, target+"/lun/lun_0/port"))
		devices = append(devices, newDisk(t, before))
	}
	return devices[0], devices[1]
}

func disks(t *testing.T) string {
	found, err := filepath.Glob("/sys/block/sd*")
	must(t, err)
	return strings.Join(found, " ")
}

func newDisk(t *testing.T, before string) string {
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		for path := range strings.FieldsSeq(disks(t)) {
			device := "/dev/" + filepath.Base(path)
			if !strings.Contains(before, path) && blockNumber(device) != (DevNum{}) {
				return device
			}
		}
	}
	t.Fatal("the disk did not appear")
	return ""
}

func TestLiveAReservationKeepsAnotherMachinesWritesAway(t *testing.T) {
	ctx := context.Background()
	a, b := sharedDisk(t)
	writes := func(device string) error {
		f, err := os.OpenFile(device, os.O_WRONLY|os.O_SYNC, 0)
		must(t, err)
		defer f.Close()
		_, err = f.WriteAt(make([]byte, dataSectorSize), 0)
		return err
	}
	must(t, writes(a))
	must(t, writes(b))
	release, err := Reserve(ctx, a, 0xa)
	must(t, err)
	if writes(b) == nil {
		t.Error("another machine writes to a reserved disk")
	}
	must(t, writes(a))
	_, err = Reserve(ctx, b, 0xb)
	wantError(t, err, ErrReserved)
	again, err := Reserve(ctx, a, 0xa) // the same machine after a restart
	must(t, err)
	must(t, again())
	must(t, writes(b))

	release, err = Reserve(ctx, a, 0xa)
	must(t, err)
	releaseB, err := Seize(ctx, b, 0xb)
	must(t, err)
	if writes(a) == nil {
		t.Error("a machine writes after its reservation was taken over")
	}
	must(t, writes(b))
	if err := release(); err != nil {
		t.Log(err) // it was taken away
	}
	must(t, releaseB())
	must(t, writes(a))

	_, err = Reserve(ctx, blankDevice(t, deviceSize), 0xa)
	wantError(t, err, ErrNoReservations)
}
