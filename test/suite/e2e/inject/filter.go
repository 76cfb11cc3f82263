//go:build linux && amd64

package inject

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// helperEnv makes a test binary the helper, and names the program.
const helperEnv = "KEYAGENT_TEST_INJECT"

// throughHelper makes cmd start the helper instead.
func throughHelper(cmd *exec.Cmd) {
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, helperEnv+"="+cmd.Path)
	cmd.Path = "/proc/self/exe"
}

// Main returns at once, unless this process is the helper: then it does not return.
func Main() {
	path := os.Getenv(helperEnv)
	if path == "" {
		return
	}
	runtime.LockOSThread() // the filter is that of one thread, and of what it becomes
	os.Unsetenv(helperEnv)
	err := install(filter())
	if err == nil {
		err = syscall.Exec(path, os.Args, os.Environ())
	}
	fmt.Fprintf(os.Stderr, "inject: %s: %v\n", path, err)
	os.Exit(126)
}

// filter stops at every call that describe knows, and lets all others pass.
func filter() []unix.SockFilter {
	numbers := []uint64{unix.SYS_OPENAT, unix.SYS_IOCTL}
	for n := range byDescriptor {
		numbers = append(numbers, n)
	}
	for n := range byName {
		numbers = append(numbers, n)
	}
	const (
		load   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS // of struct seccomp_data; the number is its first field
		equal  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		answer = unix.BPF_RET | unix.BPF_K
	)
	program := []unix.SockFilter{{Code: load, K: 0}}
	for i, n := range numbers {
		program = append(program, unix.SockFilter{Code: equal, K: uint32(n), Jt: uint8(len(numbers) - i)})
	}
	return append(program,
		unix.SockFilter{Code: answer, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: answer, K: unix.SECCOMP_RET_TRACE})
}

func install(program []unix.SockFilter) error {
	// Without this only root may, and with it mount and device-mapper still work.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no new privileges: %w", err)
	}
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		return fmt.Errorf("seccomp filter: %w", err)
	}
	runtime.KeepAlive(program)
	return nil
}
