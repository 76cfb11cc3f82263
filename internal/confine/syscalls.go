//go:build amd64 || arm64

package confine

import (
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Syscalls takes from the process the system calls that nothing of its work needs, and
// with them the privileges of set-user-ID programs. It reports false, and has done
// nothing, if the kernel has no filters, or if the one that a unit or a container put
// round this process lets it have none of its own: units of the version before do.
func Syscalls(work Work) (bool, error) {
	// This thread's filter, with the promise that the kernel wants before it, becomes
	// that of all.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	action := uint32(unix.SECCOMP_RET_ERRNO)
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	if errno == unix.ENOSYS || errno == unix.EINVAL {
		return false, nil
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return false, fmt.Errorf("%w: no_new_privs: %w", ErrRefused, err)
	}
	filter := program(work)
	fprog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(filter)
	switch {
	case errno == unix.EPERM && filtered():
		return false, nil
	case errno != 0:
		return false, fmt.Errorf("%w: seccomp: %w", ErrRefused, errno)
	case thread != 0:
		return false, fmt.Errorf("%w: seccomp: thread %d has a filter of its own", ErrRefused, thread)
	}
	return true, nil
}

// filtered reports that the process has a filter already.
func filtered() bool {
	mode, err := unix.PrctlRetInt(unix.PR_GET_SECCOMP, 0, 0, 0, 0)
	return err == nil && mode == unix.SECCOMP_MODE_FILTER
}

// What a filter sees of a call: struct seccomp_data of linux/seccomp.h. The processors
// that this is built for store the lower half of an argument first.
const (
	offsetNumber       = 0
	offsetArchitecture = 4
	offsetArgument     = 16
)

// program is the filter in the kernel's classic BPF.
func program(work Work) []unix.SockFilter {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		least = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		bits  = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		end   = unix.BPF_RET | unix.BPF_K
	)
	refuse := unix.SockFilter{Code: end, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)}
	unknown := unix.SockFilter{Code: end, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)}
	allow := unix.SockFilter{Code: end, K: unix.SECCOMP_RET_ALLOW}
	// The number means another call on another architecture.
	p := []unix.SockFilter{{Code: load, K: offsetArchitecture}, {Code: equal, K: architecture, Jt: 1}, refuse, {Code: load, K: offsetNumber}}
	if x32 != 0 {
		p = append(p, unix.SockFilter{Code: least, K: x32, Jf: 1}, refuse)
	}
	each := func(calls []uint32, verdict unix.SockFilter) {
		for _, n := range calls {
			p = append(p, unix.SockFilter{Code: equal, K: n, Jf: 1}, verdict)
		}
	}
	for _, g := range refused {
		if !slices.Contains(g.allowed, work) {
			each(g.calls, refuse)
		}
	}
	each(own, refuse)
	each(absent, unknown)
	if work != Commands {
		each([]uint32{unix.SYS_CLONE3}, unknown)
		p = append(p, unix.SockFilter{Code: equal, K: unix.SYS_CLONE, Jf: 3}, unix.SockFilter{Code: load, K: offsetArgument},
			unix.SockFilter{Code: bits, K: namespaces, Jf: 1}, refuse)
	}
	return append(p, allow)
}
