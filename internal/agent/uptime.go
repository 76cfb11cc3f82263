package agent

import (
	"golang.org/x/sys/unix"
)

// uptime returns the seconds since power on, which the clocks of host and guest
// need not agree about.
func uptime() float64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return float64(ts.Sec) + float64(ts.Nsec/1e6)/1e3
}
