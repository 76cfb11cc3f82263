// Package mount mounts one device on one place and takes it off again, where
// others may try to put something else in between: links are not followed, what is
// mounted is compared by device number, and a mount that cannot be taken off whole
// stays.
package mount

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
)

// ErrBusy means that something uses what was to be taken off.
var ErrBusy = errors.New("in use")

// flags are the options of mount(8) that the kernel takes as bits; with a leading
// "no" where that clears one.
var flags = map[string]struct {
	set, clear uintptr
}{
	"ro": {set: unix.MS_RDONLY}, "rw": {clear: unix.MS_RDONLY},
	"nosuid": {set: unix.MS_NOSUID}, "suid": {clear: unix.MS_NOSUID},
	"nodev": {set: unix.MS_NODEV}, "dev": {clear: unix.MS_NODEV},
	"noexec": {set: unix.MS_NOEXEC}, "exec": {clear: unix.MS_NOEXEC},
	"sync": {set: unix.MS_SYNCHRONOUS}, "async": {clear: unix.MS_SYNCHRONOUS},
	"dirsync": {set: unix.MS_DIRSYNC}, "lazytime": {set: unix.MS_LAZYTIME}, "nolazytime": {clear: unix.MS_LAZYTIME},
	"noatime": {set: unix.MS_NOATIME}, "atime": {clear: unix.MS_NOATIME},
	"nodiratime": {set: unix.MS_NODIRATIME}, "diratime": {clear: unix.MS_NODIRATIME},
	"relatime": {set: unix.MS_RELATIME}, "norelatime": {clear: unix.MS_RELATIME}, "strictatime": {set: unix.MS_STRICTATIME},
	"silent": {set: unix.MS_SILENT}, "loud": {clear: unix.MS_SILENT},
	"defaults": {},
}

// ignored are for programs that read /etc/fstab; the kernel never sees them.
var ignored = []string{"auto", "noauto", "nofail", "_netdev"}

// parse splits options into the kernel's bits and what the filesystem gets.
func parse(options []string) (bits uintptr, data string) {
	var rest []string
next:
	for _, o := range options {
		if f, ok := flags[o]; ok {
			bits = bits&^f.clear | f.set
			continue
		}
		for _, i := range ignored {
			if o == i {
				continue next
			}
		}
		if strings.HasPrefix(o, "x-") || strings.HasPrefix(o, "comment=") {
			continue
		}
		rest = append(rest, o)
	}
	return bits, strings.Join(rest, ",")
}

// Source is what is mounted: the node of a device, and the number that it must
// have.
type Source struct {
	Path   string
	Device uint64
}

// Number returns the device number of the node at a path, 0 if there is none.
func Number(path string) uint64 {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0
	}
	return st.Rdev
}

// check refuses a node that is not the device's.
func (s Source) check() error {
	if n := Number(s.Path); n != s.Device {
		return failure.Newf(failure.DeviceBusy, "something replaced the node; udevadm trigger makes it anew", "%s is device %d:%d, expected is %d:%d",
			s.Path, unix.Major(n), unix.Minor(n), unix.Major(s.Device), unix.Minor(s.Device))
	}
	return nil
}

// Mount mounts source on target and returns the canonical path of target. It
// succeeds if exactly that is mounted there already. Folders that do not exist are
// made, for everybody to pass through.
func Mount(source Source, target, fstype string, options []string) (canonical string, err error) {
	place, err := Find(target, true)
	if err != nil {
		return "", err
	}
	defer place.Close()
	switch on, err := At(place.Path); {
	case err != nil:
		return "", err
	case on == nil:
	case on.Is(source.Device):
		return place.Path, nil
	default:
		return "", failure.Newf(failure.DeviceBusy, "unmount it, or choose another mount point", "another device is mounted on %s", place.Path)
	}
	if err := source.check(); err != nil {
		return "", err
	}
	bits, data := parse(options)
	if err := unix.Mount(source.Path, place.descriptor(), fstype, bits, data); err != nil {
		return "", fmt.Errorf("mount %s on %s: %w", source.Path, place.Path, err)
	}
	if err := verify(source, place.Path); err != nil {
		return "", errors.Join(err, unix.Unmount(place.Path, unix.UMOUNT_NOFOLLOW))
	}
	return place.Path, nil
}

// verify looks at what was mounted: the node could have been exchanged in between.
func verify(source Source, path string) error {
	on, err := At(path)
	if err != nil {
		return err
	}
	if on == nil || !on.Is(source.Device) {
		return failure.Newf(failure.DeviceBusy, "", "what was mounted on %s is not %s", path, source.Path)
	}
	return nil
}

// Unmount takes the device off target. What else is mounted there stays, and so
// does everything if something uses the device: the error then wraps [ErrBusy] and
// names who.
func Unmount(source Source, target string) error {
	on, err := At(target)
	if err != nil || on == nil || !on.Is(source.Device) {
		return err
	}
	if err := others(source, target); err != nil {
		return err
	}
	if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW); err != nil {
		if errors.Is(err, unix.EBUSY) {
			return busy(source, target, fmt.Errorf("unmount %s", target))
		}
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

// others refuses to take off one of several mounts of a device: the device would
// stay in use, and the place bare.
func others(source Source, target string) error {
	all, err := Table()
	if err != nil {
		return err
	}
	for _, e := range all {
		if e.Is(source.Device) && e.Point != target {
			return failure.New(failure.DeviceBusy, fmt.Errorf("%w: it is mounted on %s too", ErrBusy, e.Point), "umount "+e.Point+", then try again")
		}
		if under(e.Point, target) {
			return failure.New(failure.DeviceBusy, fmt.Errorf("%w: %s is mounted inside it", ErrBusy, e.Point), "close or unmount that first")
		}
	}
	return nil
}

func under(path, parent string) bool {
	return strings.HasPrefix(path, strings.TrimSuffix(parent, "/")+"/")
}

// Busy is an error that names who uses a device or what is mounted from it.
func Busy(source Source, target string) error {
	return busy(source, target, fmt.Errorf("close %s", source.Path))
}

func busy(source Source, target string, what error) error {
	hint := "see who uses it: fuser -vm " + target
	if target == "" {
		hint = "see who uses it: lsof " + source.Path
	}
	names := Holders(source, target)
	if len(names) == 0 {
		return failure.New(failure.DeviceBusy, fmt.Errorf("%w: %w", what, ErrBusy), hint)
	}
	return failure.New(failure.DeviceBusy, fmt.Errorf("%w: %w by %s", what, ErrBusy, strings.Join(names, ", ")), "end them, then try again")
}

// SwapOn and SwapOff are swapon(2) and swapoff(2).
func SwapOn(path string) error { return swap(unix.SYS_SWAPON, path) }

// SwapOff stops swapping to a device.
func SwapOff(path string) error { return swap(unix.SYS_SWAPOFF, path) }

func swap(call uintptr, path string) error {
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(call, pointer(p), 0, 0); errno != 0 {
		return &os.PathError{Op: "swap", Path: path, Err: errno}
	}
	return nil
}
