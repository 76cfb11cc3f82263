package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
)

// perMount are the flags that each mount of a filesystem has for itself.
const perMount = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME | unix.MS_NODIRATIME | unix.MS_RELATIME

// BindFolder shows on target what source.Path shows, which has to be a mount of the
// source's device. Options can take rights away and give none back. It succeeds if exactly
// that is there already; folders that do not exist are made.
func BindFolder(source Source, target string, options []string) error {
	from, err := Find(source.Path, false)
	if err != nil {
		return err
	}
	defer from.Close()
	if err := verify(source, from.Path); err != nil {
		return err
	}
	to, err := Find(target, true)
	if err != nil {
		return err
	}
	defer to.Close()
	bits, _ := parse(options)
	switch on, err := At(to.Path); {
	case err != nil:
		return err
	case on == nil:
	case !on.Is(source.Device):
		return failure.Newf(failure.DeviceBusy, "unmount it", "another device is mounted on %s", to.Path)
	case on.ReadOnly && bits&unix.MS_RDONLY == 0 && !readOnlyAt(from.Path):
		return failure.Newf(failure.DeviceBusy, "unmount it", "it is mounted read-only on %s already", to.Path)
	default:
		// It may have been cut off before this.
		return restrict(to.Path, bits)
	}
	if err := unix.Mount(from.descriptor(), to.descriptor(), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show %s on %s: %w", from.Path, to.Path, err)
	}
	err = verify(source, to.Path)
	if err == nil {
		err = restrict(to.Path, bits)
	}
	if err != nil {
		return errors.Join(err, unix.Unmount(to.Path, unix.UMOUNT_NOFOLLOW))
	}
	return nil
}

func readOnlyAt(path string) bool {
	on, err := At(path)
	return err == nil && on != nil && on.ReadOnly
}

// restrict adds flags to those that a mount has.
func restrict(path string, bits uintptr) error {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	// The kernel's names for both are the same numbers, up to relatime.
	have := uintptr(st.Flags) & (unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC | unix.ST_NOATIME | unix.ST_NODIRATIME)
	if st.Flags&unix.ST_RELATIME != 0 && bits&unix.MS_NOATIME == 0 {
		have |= unix.MS_RELATIME
	}
	if err := unix.Mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|have|bits&perMount, ""); err != nil {
		return fmt.Errorf("take rights from the mount on %s: %w", path, err)
	}
	return nil
}

// BindDevice shows the node of the source's device at target, a file that is made if there
// is none. It succeeds if the device is there already.
func BindDevice(source Source, target string) error {
	dir, err := Find(filepath.Dir(target), true)
	if err != nil {
		return err
	}
	defer dir.Close()
	name := filepath.Base(target)
	var st unix.Stat_t
	switch err := unix.Fstatat(dir.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); {
	case errors.Is(err, unix.ENOENT):
		fd, err := unix.Openat(dir.fd, name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return &os.PathError{Op: "create", Path: target, Err: err}
		}
		_ = unix.Close(fd)
	case err != nil:
		return &os.PathError{Op: "stat", Path: target, Err: err}
	case st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == source.Device:
		return nil
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return failure.Newf(failure.DeviceBusy, "unmount or remove it", "something else is at %s", target)
	}
	if err := source.check(); err != nil {
		return err
	}
	fd, err := unix.Openat(dir.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: target, Err: err}
	}
	defer unix.Close(fd)
	place := Place{Path: filepath.Join(dir.Path, name), fd: fd}
	if err := unix.Mount(source.Path, place.descriptor(), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show %s at %s: %w", source.Path, place.Path, err)
	}
	if Number(place.Path) != source.Device {
		return errors.Join(failure.Newf(failure.DeviceBusy, "", "what was mounted at %s is not %s", place.Path, source.Path), unix.Unmount(place.Path, unix.UMOUNT_NOFOLLOW))
	}
	return nil
}

// Points are the canonical paths at which a device is shown: as the filesystem on it, or as
// its node.
func Points(device uint64) ([]string, error) {
	all, err := Table()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range all {
		// A node lies in /dev, or where somebody made one. Other filesystems are not asked:
		// one over a network may not answer.
		if e.Is(device) || (e.Type == "devtmpfs" || e.Type == "tmpfs") && Number(e.Point) == device {
			out = append(out, e.Point)
		}
	}
	return out, nil
}

// maxStacked bounds how many mounts are taken off one place.
const maxStacked = 64

// Clear takes all mounts off a path, and removes the empty folder or file that is left.
// It succeeds if there is nothing. Data that lies on the bare path stays, with an error.
func Clear(path string) error {
	dir, err := Find(filepath.Dir(path), false)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	path = filepath.Join(dir.Path, filepath.Base(path))
	for range maxStacked {
		on, err := At(path)
		if err != nil {
			return err
		}
		if on == nil {
			return removeBare(dir, path)
		}
		switch err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW); {
		case errors.Is(err, unix.EBUSY):
			return busy(Source{Device: on.Device}, path, fmt.Errorf("unmount %s", path))
		case err != nil && !errors.Is(err, unix.EINVAL): // invalid: somebody else did it
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	return failure.Newf(failure.DeviceBusy, "", "more than %d mounts on %s", maxStacked, path)
}

// removeBare removes what a mount was on.
func removeBare(dir *Place, path string) error {
	name := filepath.Base(path)
	var st unix.Stat_t
	err := unix.Fstatat(dir.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err == nil {
		switch kind := st.Mode & unix.S_IFMT; {
		case kind == unix.S_IFDIR:
			err = unix.Unlinkat(dir.fd, name, unix.AT_REMOVEDIR)
		case kind == unix.S_IFREG && st.Size == 0, kind == unix.S_IFBLK, kind == unix.S_IFLNK:
			err = unix.Unlinkat(dir.fd, name, 0)
		default:
			err = errors.New("it is not empty: something was written there while nothing was mounted")
		}
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "remove", Path: path, Err: err}
	}
	return nil
}

// Remove removes a folder and what is in it, unless something is mounted on it or below.
func Remove(dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	place, err := Find(dir, false)
	if err != nil {
		return err
	}
	defer place.Close()
	all, err := Table()
	if err != nil {
		return err
	}
	for _, e := range all {
		if e.Point == place.Path || under(e.Point, place.Path) {
			return failure.New(failure.DeviceBusy, fmt.Errorf("%w: %s is mounted", ErrBusy, e.Point), "umount "+e.Point)
		}
	}
	return os.RemoveAll(place.Path)
}

// DeviceAt returns the number of the block device at a path that is no link. It is 0 if
// there is none, or one that the kernel does not have any more.
func DeviceAt(path string) (uint64, error) {
	var st unix.Stat_t
	switch err := unix.Lstat(path, &st); {
	case errors.Is(err, unix.ENOENT):
		return 0, nil
	case err != nil:
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, nil
	}
	if _, err := os.Stat(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return 0, nil
		}
		return 0, err
	}
	return st.Rdev, nil
}
