package agent

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
)

// The ext4 superblock, as far as it is looked at. Offsets are those of the
// kernel's Documentation/filesystems/ext4/super.rst.
const (
	superblockAt    = 1024
	superblockSize  = 1024
	offMountTime    = 0x2C
	offMountCount   = 0x34
	offMagic        = 0x38
	offChecksumType = 0x175
	offChecksum     = 0x3FC
	ext4Magic       = 0xEF53
	checksumCRC32C  = 1
)

// superblock is a valid ext4 superblock.
type superblock struct {
	everMounted bool
}

// readSuperblock reports whether device holds an ext4 filesystem. The magic
// number alone would be met by chance on a fresh encrypted disk, so the
// checksum must hold as well.
func readSuperblock(device string) (superblock, bool, error) {
	f, err := os.Open(device)
	if err != nil {
		return superblock{}, false, err
	}
	defer f.Close()
	b := make([]byte, superblockSize)
	if _, err := f.ReadAt(b, superblockAt); err != nil {
		if errors.Is(err, io.EOF) {
			return superblock{}, false, nil
		}
		return superblock{}, false, fmt.Errorf("read the filesystem's superblock: %w", err)
	}
	sb, ok := parseSuperblock(b)
	return sb, ok, nil
}

func parseSuperblock(b []byte) (superblock, bool) {
	if len(b) != superblockSize || binary.LittleEndian.Uint16(b[offMagic:]) != ext4Magic || b[offChecksumType] != checksumCRC32C {
		return superblock{}, false
	}
	// The kernel leaves out the final inversion.
	sum := ^crc32.Checksum(b[:offChecksum], crc32.MakeTable(crc32.Castagnoli))
	if sum != binary.LittleEndian.Uint32(b[offChecksum:]) {
		return superblock{}, false
	}
	return superblock{everMounted: binary.LittleEndian.Uint32(b[offMountTime:]) != 0 || binary.LittleEndian.Uint16(b[offMountCount:]) != 0}, true
}

// makeFilesystem makes an ext4 filesystem on a volume that is still pending. A
// filesystem that was ever mounted is never overwritten, whatever the record
// says: then the record, and not the disk, is wrong.
func makeFilesystem(ctx context.Context, device string) error {
	sb, found, err := readSuperblock(device)
	if err != nil {
		return err
	}
	if found && sb.everMounted {
		return failure.Newf(failure.Tampered, "the key service's storage may have been rolled back: restore its record of this volume",
			"the key service says that the volume is new, but it holds a filesystem that was in use")
	}
	cmd := exec.CommandContext(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-O", "metadata_csum", "-E", "nodiscard", device)
	cmd.Env = []string{"PATH=" + searchPath, "LC_ALL=C"}
	if cmd.Path, err = lookPath("mke2fs"); err != nil {
		return failure.New(failure.Configuration, err, "install e2fsprogs")
	}
	cmd.Err = nil
	// It must not go on writing when this process is killed: the next one begins
	// again. The kernel ends it with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make the filesystem: %w: %s", err, strings.TrimSpace(string(out)))
	}
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

const searchPath = "/usr/sbin:/usr/bin:/sbin:/bin"

// lookPath finds a tool in the system's folders alone: the environment's PATH
// is not trusted.
func lookPath(tool string) (string, error) {
	for _, dir := range filepath.SplitList(searchPath) {
		p := filepath.Join(dir, tool)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not installed", tool)
}

var mountOptions = map[string]uintptr{
	"nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC, "ro": unix.MS_RDONLY,
	"noatime": unix.MS_NOATIME, "relatime": unix.MS_RELATIME, "sync": unix.MS_SYNCHRONOUS,
}

func mountFlags(options []string) (uintptr, error) {
	var flags uintptr
	for _, o := range options {
		f, ok := mountOptions[o]
		if !ok {
			return 0, fmt.Errorf("%q is not a known mount option", o)
		}
		flags |= f
	}
	return flags, nil
}

// mount mounts device, and succeeds if exactly that is mounted there already.
func mount(device, target string, options []string) error {
	flags, err := mountFlags(options)
	if err != nil {
		return err
	}
	switch mounted, err := mountedAt(target); {
	case err != nil:
		return err
	case mounted == nil:
	case *mounted == deviceNumber(device):
		return nil
	default:
		return failure.Newf(failure.DeviceBusy, "unmount it, or choose another mount point", "another device is mounted on %s", target)
	}
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(device, target, "ext4", flags, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", device, target, err)
	}
	return nil
}

// unmount takes device off target. What else is mounted there stays.
func unmount(device, target string) error {
	mounted, err := mountedAt(target)
	if err != nil || mounted == nil || *mounted != deviceNumber(device) {
		return err
	}
	if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW); err != nil {
		if errors.Is(err, unix.EBUSY) {
			return failure.New(failure.DeviceBusy, fmt.Errorf("unmount %s: %w", target, err), "something still uses it: fuser -vm "+target)
		}
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

// mountedAt returns the device number of what is mounted on target, or nil.
func mountedAt(target string) (*uint64, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var last *uint64
	scan := bufio.NewScanner(f)
	scan.Buffer(nil, 1<<20)
	for scan.Scan() {
		fields := strings.Fields(scan.Text())
		if len(fields) < 5 || unescapeMount(fields[4]) != target {
			continue
		}
		var major, minor uint32
		if _, err := fmt.Sscanf(fields[2], "%d:%d", &major, &minor); err != nil {
			return nil, fmt.Errorf("mountinfo: %w", err)
		}
		n := unix.Mkdev(major, minor)
		last = &n // a later line lies on top
	}
	return last, scan.Err()
}

var mountEscapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

func unescapeMount(s string) string { return mountEscapes.Replace(s) }

func deviceNumber(path string) uint64 {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0
	}
	return st.Rdev
}
