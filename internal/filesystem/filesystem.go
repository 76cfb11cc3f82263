// Package filesystem makes, checks and grows filesystems on mappings, with the
// distribution's own tools. It decides nothing: whether a device may be written is
// settled before.
package filesystem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/keyagent/keyagent/internal/failure"
)

// ErrNeedsRepair means that a filesystem is damaged in a way that its own tools do
// not repair by themselves. It was not mounted.
var ErrNeedsRepair = errors.New("filesystem needs repair by hand")

// Options are choices at the making of a filesystem.
type Options struct {
	Label string
	// OneWriter asks for protection against a second mount, where the filesystem
	// has it. After a crash its tool and the kernel then wait to see whether another
	// machine writes.
	OneWriter bool
}

// kind is how one type of filesystem is handled.
type kind struct {
	pkg  string // Debian's package of its tools
	make func(device string, o Options) []string
	// check is run before a mount, and verdict says what its exit code means.
	check   []string
	isClean func(device string) bool // says that the check would find nothing to do
	verdict func(code int) (repaired bool, err error)
	// grow gets the device or the mount point, see onMount.
	grow    []string
	onMount bool
	// mount are options that are added unless they are given.
	mount []string
	// repair is what a person is told.
	repair string
}

var kinds = map[string]kind{
	"ext4": {
		pkg: "e2fsprogs",
		make: func(device string, o Options) []string {
			features := "metadata_csum"
			if o.OneWriter {
				features += ",mmp"
			}
			args := []string{"mke2fs", "-q", "-F", "-t", "ext4", "-O", features, "-E", "nodiscard"}
			if o.Label != "" {
				args = append(args, "-L", o.Label)
			}
			return append(args, device)
		},
		check:   []string{"e2fsck", "-p"},
		isClean: cleanExt4,
		verdict: func(code int) (bool, error) {
			switch {
			case code&4 != 0:
				return false, ErrNeedsRepair
			case code&^3 != 0:
				return false, fmt.Errorf("%w: it could not be checked", ErrNeedsRepair)
			}
			return code != 0, nil
		},
		grow:   []string{"resize2fs"},
		mount:  []string{"errors=remount-ro"},
		repair: "e2fsck -f %s",
	},
	// The kernel replays XFS's log and checks every block of metadata that it
	// reads; fsck.xfs does nothing on purpose.
	"xfs": {
		pkg: "xfsprogs",
		make: func(device string, o Options) []string {
			args := []string{"mkfs.xfs", "-q", "-f", "-K"}
			if o.Label != "" {
				args = append(args, "-L", o.Label)
			}
			return append(args, device)
		},
		grow: []string{"xfs_growfs"}, onMount: true,
		repair: "xfs_repair %s",
	},
	"btrfs": {
		pkg: "btrfs-progs",
		make: func(device string, o Options) []string {
			args := []string{"mkfs.btrfs", "-q", "-f", "-K"}
			if o.Label != "" {
				args = append(args, "-L", o.Label)
			}
			return append(args, device)
		},
		grow: []string{"btrfs", "filesystem", "resize", "max"}, onMount: true,
		repair: "btrfs check %s",
	},
}

func (k kind) clean(device string) bool { return k.isClean != nil && k.isClean(device) }

func of(fstype string) (kind, error) {
	k, ok := kinds[fstype]
	if !ok {
		return kind{}, failure.Newf(failure.Configuration, "", "filesystem %.20q is not supported", fstype)
	}
	return k, nil
}

// Make makes a filesystem. Whatever is on the device is overwritten.
func Make(ctx context.Context, device, fstype string, o Options) error {
	k, err := of(fstype)
	if err != nil {
		return err
	}
	if _, out, err := run(ctx, k.pkg, k.make(device, o)...); err != nil {
		return fmt.Errorf("make the filesystem: %w: %s", err, out)
	}
	return Sync(device)
}

// MakeSwap makes a swap area.
func MakeSwap(ctx context.Context, device string) error {
	if _, out, err := run(ctx, "util-linux", "mkswap", "-q", device); err != nil {
		return fmt.Errorf("make the swap area: %w: %s", err, out)
	}
	return nil
}

// Sync flushes a device.
func Sync(device string) error {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Check has a filesystem's own tool look at it before it is mounted, and repair
// what is safe to repair. repaired says that something was. The error wraps
// [ErrNeedsRepair] if a person has to decide.
func Check(ctx context.Context, device, fstype string, readOnly bool) (repaired bool, err error) {
	k, err := of(fstype)
	if err != nil || k.check == nil || readOnly || k.clean(device) {
		return false, err
	}
	code, out, err := run(ctx, k.pkg, append(slices.Clone(k.check), device)...)
	if code < 0 {
		return false, fmt.Errorf("check the filesystem: %w: %s", err, out)
	}
	repaired, err = k.verdict(code)
	if err != nil {
		return false, needsRepair(k, device, fmt.Errorf("%w: %s", err, out))
	}
	return repaired, nil
}

// Damaged turns the error of a mount that found damage into one that says so.
func Damaged(device, fstype string, err error) error {
	if k, kindErr := of(fstype); kindErr == nil && isDamage(err) {
		return needsRepair(k, device, fmt.Errorf("%w: %w", ErrNeedsRepair, err))
	}
	return err
}

func needsRepair(k kind, device string, err error) error {
	return failure.New(failure.NeedsRepair, err, "the mapping is open and nothing is mounted: make a copy of the disk, then "+fmt.Sprintf(k.repair, device))
}

// GrowsUnmounted says whether [Grow] needs no mount point.
func GrowsUnmounted(fstype string) bool { return !kinds[fstype].onMount }

// Grow makes a mounted filesystem as large as its device.
func Grow(ctx context.Context, device, mountPoint, fstype string) error {
	k, err := of(fstype)
	if err != nil {
		return err
	}
	target := device
	if k.onMount {
		if mountPoint == "" {
			return failure.Newf(failure.State, "mount it, then resize again", "%s grows only while it is mounted; the mapping has grown", fstype)
		}
		target = mountPoint
	}
	if mountPoint == "" {
		// Its tool wants to have seen all of it that nobody uses.
		code, out, err := run(ctx, k.pkg, append(slices.Clone(k.check), "-f", device)...)
		if code < 0 {
			return fmt.Errorf("check the filesystem: %w: %s", err, out)
		}
		if _, err := k.verdict(code); err != nil {
			return needsRepair(k, device, fmt.Errorf("%w: %s", err, out))
		}
	}
	if _, out, err := run(ctx, k.pkg, append(slices.Clone(k.grow), target)...); err != nil {
		return fmt.Errorf("grow the filesystem: %w: %s", err, out)
	}
	return nil
}

// MountOptions adds the safe defaults of a filesystem to options.
func MountOptions(fstype string, options []string) []string {
	out := slices.Clone(options)
	for _, o := range kinds[fstype].mount {
		name := o[:slices.Index([]byte(o), '=')+1]
		if !slices.ContainsFunc(out, func(have string) bool { return len(have) > len(name) && have[:len(name)] == name }) {
			out = append(out, o)
		}
	}
	return out
}
