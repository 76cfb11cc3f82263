package filesystem

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
)

// Suits says whether a filesystem that was made elsewhere can be mounted from a device:
// its smallest blocks must not be smaller than the device's sectors. A type that it does
// not know suits.
func Suits(device, fstype string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	sector, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
	if err != nil {
		return fmt.Errorf("%s: size of its sectors: %w", device, err)
	}
	return suits(f, fstype, sector)
}

func suits(f io.ReaderAt, fstype string, sector int) error {
	head := make([]byte, 2048)
	if _, err := f.ReadAt(head, 0); err != nil {
		return err
	}
	smallest, fix := sector, ""
	switch fstype {
	case "ext4": // s_log_block_size of the superblock at 1024
		smallest, fix = 1024<<min(binary.LittleEndian.Uint32(head[1024+24:]), 6), "mke2fs -b 4096"
	case "xfs": // sb_sectsize
		smallest, fix = int(binary.BigEndian.Uint16(head[102:])), "mkfs.xfs -s size=4096"
	}
	if smallest < sector {
		return failure.Newf(failure.Configuration, "make the image with "+fix, "the image's %s has blocks of %d bytes, and the volume sectors of %d", fstype, smallest, sector)
	}
	return nil
}
