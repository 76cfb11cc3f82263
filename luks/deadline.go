package luks

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Deadline is a point in time by the clock that goes on while the machine sleeps
// or is frozen (CLOCK_BOOTTIME), and that nobody can set. The zero value has passed.
type Deadline struct{ at time.Duration }

// DeadlineIn returns the deadline d from now. Take it before the request that is
// granted the time, not after the answer.
func DeadlineIn(d time.Duration) Deadline { return Deadline{bootTime() + d} }

// left returns the time that is left, at most zero if none is.
func (d Deadline) left() time.Duration { return d.at - bootTime() }

func (d Deadline) check() error {
	if left := d.left(); left <= 0 {
		return fmt.Errorf("%w, %v ago", ErrTooLate, min(-left, bootTime()).Round(time.Millisecond))
	}
	return nil
}

func bootTime() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) // cannot fail for this clock
	return time.Duration(ts.Nano())
}
