package measured

import (
	"context"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/attestation"
)

// DefaultRTMR is RTMR 3 of a TD in Linux 6.16 and later: what is written to it extends
// the register, see Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest in
// the kernel's sources. The kernel and its loader measure into RTMR 1 and 2.
const DefaultRTMR = "/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384"

// RTMR is a register of a TD. There is no log of it: a profile names its value.
type RTMR struct {
	Path string // empty: DefaultRTMR
}

func (r *RTMR) open() (*os.File, error) {
	path := r.Path
	if path == "" {
		path = DefaultRTMR
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", attestation.ErrNoDevice, err)
	}
	return f, nil
}

// Ready implements [Register].
func (r *RTMR) Ready(context.Context) error {
	f, err := r.open()
	if err != nil {
		return unready(err)
	}
	var value [sha512.Size384]byte
	if _, err = io.ReadFull(f, value[:]); err != nil {
		err = unready(fmt.Errorf("rtmr 3: %w", err))
	}
	return errors.Join(err, f.Close())
}

// Extend implements [Register]. The kernel takes a digest in one write.
func (r *RTMR) Extend(_ context.Context, e Event) (Record, error) {
	f, err := r.open()
	if err != nil {
		return Record{}, unready(err)
	}
	if _, err = f.WriteAt(e.SHA384[:], 0); err != nil {
		err = fmt.Errorf("extend rtmr 3: %w", err)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return Record{}, err
	}
	return Record{"rtmr3", e.SHA384[:]}, nil
}
