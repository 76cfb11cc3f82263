package luks

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The part of the device-mapper's ioctl interface (linux/dm-ioctl.h) that this
// package uses. It is used directly: libcryptsetup would read the data device while
// it holds its lock, and a disk that never answers would stop every volume.
const (
	dmControl = "/dev/mapper/control"

	dmListDevices = 0xc138fd02
	dmDevCreate   = 0xc138fd03
	dmDevRemove   = 0xc138fd04
	dmDevSuspend  = 0xc138fd06
	dmTableLoad   = 0xc138fd09
	dmTableClear  = 0xc138fd0a
	dmTableStatus = 0xc138fd0c
	dmTargetMsg   = 0xc138fd0e

	dmReadOnly        = 1 << 0
	dmSuspended       = 1 << 1
	dmStatusTable     = 1 << 4
	dmActivePresent   = 1 << 5
	dmBufferFull      = 1 << 8
	dmSkipLockFS      = 1 << 10
	dmNoFlush         = 1 << 11
	dmSecureData      = 1 << 15
	dmUeventGenerated = 1 << 13

	dmHeaderSize = 312 // sizeof(struct dm_ioctl)
	dmSpecSize   = 40  // sizeof(struct dm_target_spec)
	dmBufferSize = 16 << 10

	offDMSize    = 12
	offDMStart   = 16
	offDMTargets = 20
	offDMOpen    = 24
	offDMFlags   = 28
	offDMEvent   = 32
	offDMDev     = 40
	offDMName    = 48
	offDMUUID    = 176
	dmNameSize   = 128
	dmUUIDSize   = 129
)

// dmCall is one call of the device-mapper. A mapping is named by its UUID wherever
// something is changed: what else may have taken its name stays as it is.
type dmCall struct {
	command uintptr
	name    string
	uuid    string
	flags   uint32
	event   uint32 // for udev, see udev.go
	targets uint32
	payload []byte
}

// on names the mapping that the call is about. The kernel takes one of the two.
func (c dmCall) on(name, uuid string) dmCall {
	if c.uuid = uuid; uuid == "" {
		c.name = name
	}
	return c
}

// run makes the call and returns the kernel's answer.
func (c dmCall) run() ([]byte, error) {
	control, err := os.OpenFile(dmControl, os.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) {
		// A kernel without the device-mapper has no mapping of any name.
		return nil, fmt.Errorf("%w: the kernel has no device-mapper: %w", unix.ENXIO, err)
	}
	if err != nil {
		return nil, fmt.Errorf("reach the device-mapper: %w", err)
	}
	defer control.Close()
	buf := make([]byte, max(dmBufferSize, dmHeaderSize+len(c.payload)))
	ne := binary.NativeEndian
	ne.PutUint32(buf[0:], 4) // interface version 4.0.0
	ne.PutUint32(buf[offDMSize:], uint32(len(buf)))
	ne.PutUint32(buf[offDMStart:], dmHeaderSize)
	ne.PutUint32(buf[offDMTargets:], c.targets)
	ne.PutUint32(buf[offDMFlags:], c.flags)
	ne.PutUint32(buf[offDMEvent:], c.event)
	copy(buf[offDMName:offDMName+dmNameSize-1], c.name)
	copy(buf[offDMUUID:offDMUUID+dmUUIDSize-1], c.uuid)
	copy(buf[dmHeaderSize:], c.payload)
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), c.command, uintptr(unsafe.Pointer(&buf[0])))
		switch errno {
		case 0:
			return buf, nil
		case unix.EINTR: // a signal of Go's scheduler: nothing was done
		default:
			return nil, errno
		}
	}
}

// target is the payload that loads a table of one target.
func target(sectors int64, kind, params string) []byte {
	n := (dmSpecSize + len(params) + 1 + 7) &^ 7
	spec := make([]byte, n)
	ne := binary.NativeEndian
	ne.PutUint64(spec[8:], uint64(sectors))
	ne.PutUint32(spec[20:], uint32(n))
	copy(spec[24:dmSpecSize-1], kind)
	copy(spec[dmSpecSize:], params)
	return spec
}

// dmMessage is the payload that sends a message to the target at sector 0.
func dmMessage(text string) []byte { return append(make([]byte, 8), text+"\x00"...) }

// dmNames lists the names of all mappings.
func dmNames() ([]string, error) {
	size := dmBufferSize
	for {
		buf, err := dmCall{command: dmListDevices, payload: make([]byte, size)}.run()
		if errors.Is(err, unix.ENXIO) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list mappings: %w", err)
		}
		if binary.NativeEndian.Uint32(buf[offDMFlags:])&dmBufferFull == 0 {
			return parseNames(buf)
		}
		if size *= 4; size > 16<<20 {
			return nil, fmt.Errorf("%w: the list of mappings does not end", ErrTableMismatch)
		}
	}
}

// parseNames reads a list of struct dm_name_list: device, offset of the next entry,
// name.
func parseNames(buf []byte) ([]string, error) {
	ne := binary.NativeEndian
	at := uint64(ne.Uint32(buf[offDMStart:]))
	var names []string
	for {
		if at+12 > uint64(len(buf)) {
			return nil, fmt.Errorf("%w: the list of mappings is cut off", ErrTableMismatch)
		}
		if ne.Uint64(buf[at:]) == 0 {
			return names, nil // there is none
		}
		names = append(names, cString(buf[at+12:]))
		next := uint64(ne.Uint32(buf[at+8:]))
		if next == 0 {
			return names, nil
		}
		if next < 12 {
			return nil, fmt.Errorf("%w: the list of mappings runs in a circle", ErrTableMismatch)
		}
		at += next
	}
}
