package secret

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Hardening is what [HardenProcess] put in force.
type Hardening struct {
	Memory  Protection // of every secret
	Erasing bool       // stack and heap left-overs are erased, see Do
	Kernel  string     // release, as uname gives it
}

// HardenProcess makes the process undumpable: no core file, no ptrace or
// /proc/PID/mem by the same user. Every role calls it before it touches a key.
// A kernel that refuses is an error; nothing is degraded in silence.
func HardenProcess() (Hardening, error) {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return Hardening{}, fmt.Errorf("make the process undumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return Hardening{}, fmt.Errorf("forbid core files: %w", err)
	}
	var u unix.Utsname
	_ = unix.Uname(&u)
	release, _, _ := strings.Cut(string(u.Release[:]), "\x00")
	return Hardening{Memory: InForce(), Erasing: Erases, Kernel: release}, nil
}
