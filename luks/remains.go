package luks

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A mapping is made in four steps: an empty one with its name and UUID, its table,
// the switch to that table, its node in /dev/mapper. What a process that is killed
// in between leaves behind is put right here, or the volume would stay shut until
// the machine starts anew.

const dmRemove = 0xc138fd04

// unborn says that the mapping is one of ours and never had a table in force. It
// has served no read and no write.
func (m liveMapping) unborn(uuid, name string) bool {
	return m.empty && m.open == 0 && m.uuid == dmUUID(uuid, name)
}

// removeUnborn removes such a mapping. libcryptsetup does not: it takes it for
// something that it has not made.
func removeUnborn(m liveMapping, name string) error {
	control, err := os.OpenFile(dmControl, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("reach the device-mapper: %w", err)
	}
	defer control.Close()
	buf := make([]byte, dmHeaderSize)
	ne := binary.NativeEndian
	ne.PutUint32(buf[0:], 4) // interface version 4.0.0
	ne.PutUint32(buf[offDMSize:], dmHeaderSize)
	ne.PutUint32(buf[offDMStart:], dmHeaderSize)
	// By UUID and not by name: what else may have taken the name stays.
	copy(buf[offDMUUID:offDMUUID+dmUUIDSize-1], m.uuid)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), dmRemove, uintptr(unsafe.Pointer(&buf[0]))); errno != 0 && errno != unix.ENXIO {
		return fmt.Errorf("remove the unfinished mapping %s: %w", name, errno)
	}
	return nil
}

// udevControl is there while udev runs.
const udevControl = "/run/udev/control"

// ensureNode makes the node of a mapping that lacks it. Where udev runs, udev does.
func ensureNode(m Mapping) error {
	if _, err := os.Stat(m.Path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(udevControl); err == nil {
		return nil
	}
	err := unix.Mknod(m.Path, unix.S_IFBLK|0o600, int(unix.Mkdev(m.Device.Major, m.Device.Minor)))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make %s: %w", m.Path, err)
	}
	return nil
}
