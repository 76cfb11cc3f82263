package luks

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Where udev runs, it makes and removes the links in /dev/mapper. Its rules act on
// events that carry a cookie of libdevmapper: flags in the upper half, the name of a
// semaphore in the lower one, which the rules count down when they are done. The
// semaphore is made and waited for here, outside any lock and no longer than the
// caller has time. Without udev the nodes are made here.

// udevControl is there while udev runs.
const udevControl = "/run/udev/control"

const (
	cookieMagic   = 0x0d4d << 16
	primarySource = 0x0040 << 16 // the event comes from the maker of the mapping

	// No rules of subsystems, of disks, or others: no links to it by what is on it, and no
	// LVM that takes it. Libdevmapper's DM_UDEV_DISABLE_*_RULES_FLAG.
	udevLooksAway = (0x0002 | 0x0004 | 0x0008) << 16

	semRemove   = 0
	semSetValue = 16
)

// cookie is a semaphore that udev's rules count down. The zero value is none.
type cookie struct {
	event uint32
	id    uintptr
}

// newCookie makes one if udev runs.
func newCookie() (cookie, error) {
	if _, err := os.Stat(udevControl); err != nil {
		return cookie{}, nil
	}
	for range 100 {
		low := 1 + rand.Uint32N(0xffff)
		id, _, errno := unix.Syscall(unix.SYS_SEMGET, uintptr(cookieMagic|low), 1, unix.IPC_CREAT|unix.IPC_EXCL|0o600)
		if errno == unix.EEXIST {
			continue
		}
		if errno == 0 {
			_, _, errno = unix.Syscall6(unix.SYS_SEMCTL, id, 0, semSetValue, 1, 0, 0)
		}
		if errno != 0 {
			return cookie{}, fmt.Errorf("make a semaphore for udev: %w", errno)
		}
		return cookie{event: primarySource | low, id: id}, nil
	}
	return cookie{}, errors.New("make a semaphore for udev: every name is taken")
}

// wait returns when udev is done, or when it has had its time, and drops the
// semaphore. answer is the device-mapper's, which says whether there was an event.
func (c cookie) wait(ctx context.Context, answer []byte) {
	if c == (cookie{}) {
		return
	}
	defer c.drop()
	if len(answer) < dmHeaderSize || binary.NativeEndian.Uint32(answer[offDMFlags:])&dmUeventGenerated == 0 {
		return
	}
	limit := time.Now().Add(patience(ctx))
	for time.Now().Before(limit) && ctx.Err() == nil {
		wantZero := [3]int16{} // struct sembuf: semaphore 0, wait until zero, no flags
		step := unix.NsecToTimespec(int64(100 * time.Millisecond))
		_, _, errno := unix.Syscall6(unix.SYS_SEMTIMEDOP, c.id, uintptr(unsafe.Pointer(&wantZero)), 1, uintptr(unsafe.Pointer(&step)), 0, 0)
		if errno != unix.EAGAIN && errno != unix.EINTR {
			return
		}
	}
}

func (c cookie) drop() {
	if c != (cookie{}) {
		_, _, _ = unix.Syscall6(unix.SYS_SEMCTL, c.id, 0, semRemove, 0, 0, 0)
	}
}

// Announce tells udev that what is on a mapping has changed: a filesystem was made there.
// udev looks by itself when a writer closes its node, but not while it still works on the
// event of the mapping, and then what waits for the filesystem waits for ever. Without udev
// it does nothing.
func Announce(m Mapping) error {
	if _, err := os.Stat(udevControl); err != nil {
		return nil
	}
	if err := os.WriteFile(fmt.Sprintf("/sys/dev/block/%d:%d/uevent", m.Device.Major, m.Device.Minor), []byte("change"), 0); err != nil {
		return fmt.Errorf("tell udev of %s: %w", m.Name, err)
	}
	return nil
}

// ensureNode makes sure that the path of a mapping leads to it.
func ensureNode(m Mapping) error {
	switch _, err := os.Stat(m.Path); {
	case err == nil:
		if got := blockNumber(m.Path); got != m.Device {
			return fmt.Errorf("%w: %s leads to the device %v, not to %v", ErrNotOurs, m.Path, got, m.Device)
		}
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	err := unix.Mknod(m.Path, unix.S_IFBLK|0o600, int(unix.Mkdev(m.Device.Major, m.Device.Minor)))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make %s: %w", m.Path, err)
	}
	return nil
}

// dropNode removes the node of a mapping that is gone, if it is there still and led
// to it.
func dropNode(name string, dev DevNum) {
	if blockNumber(mapperPath(name)) == dev {
		_ = os.Remove(mapperPath(name))
	}
}
