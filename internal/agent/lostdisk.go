package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/luks"
)

// What may be below an open volume: a disk that was detached leaves the mapping behind,
// which gives errors from then on, and its number may become another disk's.

// diskSequence is the kernel's number of the disk that a device is, or is a part of; 0
// if it is not known.
func diskSequence(n luks.DevNum) uint64 {
	if seq := sequence(n); seq != 0 {
		return seq
	}
	return readSequence(fmt.Sprintf("/sys/dev/block/%d:%d/../diskseq", n.Major, n.Minor))
}

// lost reports whether the disk below a mapping is not there any more.
func (r remembered) lost() bool {
	if r.Device == (luks.DevNum{}) {
		return false
	}
	if _, err := os.Stat(fmt.Sprintf("/sys/dev/block/%d:%d", r.Device.Major, r.Device.Minor)); errors.Is(err, fs.ErrNotExist) {
		return true
	}
	now := diskSequence(r.Device)
	return r.Disk != 0 && now != 0 && now != r.Disk
}

const lostText = "the disk of this volume is gone: what was not written is lost, and reading gives errors"

// clear removes a mapping whose disk is gone, so that the volume can be opened on the
// disk that is there now.
func (o *opening) clear(ctx context.Context, m luks.Mapping, r remembered) error {
	o.Log.Warn("the disk below an open volume is gone; its mapping is removed", "volume", o.v.ID, "mapping", m.Name, "disk", r.Device)
	o.set(func() { o.e.known = r })
	if _, err := o.unmount(o.e, sourceOf(m)); err != nil {
		return err
	}
	if err := luks.Close(ctx, o.closeRequest(m)); err != nil {
		return o.named(err, sourceOf(m), r.Mount)
	}
	return nil
}

// sameDevice refuses to call a volume open on a device that is another one by now. A
// path that leads nowhere says nothing: links to disks come and go.
func (o *opening) sameDevice(m luks.Mapping) error {
	var st unix.Stat_t
	if err := unix.Stat(o.v.DevicePath(), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return nil
	}
	if n := (luks.DevNum{Major: unix.Major(st.Rdev), Minor: unix.Minor(st.Rdev)}); n != m.DataDevice {
		return failure.Newf(failure.DeviceBusy, "close it first, if that is its disk", "the volume is open on device %v, and %s is %v", m.DataDevice, o.v.DevicePath(), n)
	}
	return nil
}
