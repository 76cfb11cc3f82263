package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/mount"
)

// errAbsent is of a disk that is not there now. It may come.
var errAbsent = errors.New("the disk is not there")

// await waits for a disk that is attached, or found, a moment later than the agent
// starts. An optional disk is not waited for: the node is ready without it, and
// opens it when udev shows it.
func (o *opening) await(ctx context.Context) error {
	device := o.v.DevicePath()
	deadline := time.Now().Add(o.AppearWait)
	for first := true; ; first = false {
		_, err := os.Stat(device)
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if o.intent.NoWait || !time.Now().Before(deadline) {
			return failure.New(failure.NotFound, fmt.Errorf("%w: %w", errAbsent, err), "is the disk attached, and is device right?")
		}
		if first {
			o.Log.Info("waiting for the disk", "volume", o.v.ID, "device", device, "at_most", o.AppearWait)
			o.Progress("waiting for "+device, o.AppearWait)
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func swapOn(path string) error {
	err := mount.SwapOn(path)
	if errors.Is(err, unix.EBUSY) {
		return nil // it is on already
	}
	return err
}

// deviceEvents signals whenever the kernel or udev reports a change of a device,
// and now and then in any case. It ends with ctx.
func deviceEvents(ctx context.Context, every time.Duration) <-chan struct{} {
	out := make(chan struct{}, 1)
	signal := func() {
		select {
		case out <- struct{}{}:
		default:
		}
	}
	go func() {
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
				signal()
			}
		}
	}()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return out // the ticker has to do
	}
	const kernelAndUdev = 1 | 2
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelAndUdev}); err != nil {
		_ = unix.Close(fd)
		return out
	}
	f := os.NewFile(uintptr(fd), "uevents")
	go func() { <-ctx.Done(); _ = f.Close() }()
	go func() {
		buf := make([]byte, 16<<10)
		for {
			// What an event says decides nothing: it is only a reason to look.
			if _, err := f.Read(buf); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return
			}
			signal()
		}
	}()
	return out
}
