//go:build linux && amd64

// Package inject runs a program and kills it as it enters the n-th system call
// that writes something which outlives it.
//
// strace counts the calls of each thread apart, and the threads of a Go program
// take turns as they like, so "the n-th write" is nothing that it could find again.
// This package follows the whole process with ptrace(2) and counts over all of
// its threads and the programs that it starts. A seccomp filter stops it at the
// calls that may write, so that all others take no longer than they do.
//
// A test binary that uses it calls [Main] first thing in its TestMain: the binary
// is also the helper that puts the filter on and becomes the program.
package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Result is what became of the program.
type Result struct {
	Calls    []string // the calls that write, in order, with what they write to
	Killed   bool     // at the last of Calls, which was not carried out
	ExitCode int      // unless Killed; -1 if some other signal ended it
}

// Process is a program that runs.
type Process struct {
	PID  int
	done chan struct{}
	res  Result
	err  error
}

// Start starts the command and kills it, and nothing that it has started, at the
// n-th call; it lives if n is 0. The command's output must go to files or nowhere.
// The caller calls Wait.
func Start(cmd *exec.Cmd, n int) (*Process, error) {
	p := &Process{done: make(chan struct{})}
	started := make(chan error)
	go func() {
		defer close(p.done)
		// Only the thread that started the program may follow it, and the thread
		// is not used for anything else afterwards.
		runtime.LockOSThread()
		t := tracer{process: p, kill: n, threads: map[int]bool{}}
		if err := t.start(cmd); err != nil {
			started <- err
			return
		}
		started <- nil
		p.err = t.follow()
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("inject: %w", err)
	}
	return p, nil
}

// Done is closed when the program and everything that it has started has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits until the program and everything that it has started has ended.
func (p *Process) Wait() (Result, error) {
	<-p.done
	return p.res, p.err
}

// Signal sends a signal to the program.
func (p *Process) Signal(s syscall.Signal) error { return syscall.Kill(p.PID, s) }

// tracer lives on one thread.
type tracer struct {
	process *Process
	kill    int
	threads map[int]bool // all that were seen
}

func (t *tracer) start(cmd *exec.Cmd) error {
	throughHelper(cmd)
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	pid := cmd.Process.Pid
	if err := cmd.Process.Release(); err != nil { // it is waited for here
		return err
	}
	t.process.PID = pid
	var status syscall.WaitStatus
	if _, err := wait(pid, &status); err != nil {
		return err
	}
	const options = unix.PTRACE_O_TRACESECCOMP | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEFORK |
		unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_EXITKILL
	if err := syscall.PtraceSetOptions(pid, options); err != nil {
		return err
	}
	t.threads[pid] = true
	return syscall.PtraceCont(pid, 0)
}

func wait(pid int, status *syscall.WaitStatus) (int, error) {
	for {
		got, err := syscall.Wait4(pid, status, syscall.WALL, nil)
		if !errors.Is(err, syscall.EINTR) {
			return got, err
		}
	}
}

// follow runs until nothing of the process group is left.
func (t *tracer) follow() error {
	for {
		var status syscall.WaitStatus
		// The group, and not just any child: this process may have others.
		tid, err := wait(-t.process.PID, &status)
		if errors.Is(err, syscall.ECHILD) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("inject: %w", err)
		}
		if status.Exited() || status.Signaled() {
			delete(t.threads, tid)
			if tid == t.process.PID && !t.process.res.Killed {
				t.process.res.ExitCode = status.ExitStatus()
			}
			continue
		}
		// One that is being killed may be gone already.
		if err := syscall.PtraceCont(tid, int(t.stopped(tid, status.StopSignal(), status.TrapCause()))); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("inject: continue: %w", err)
		}
	}
}

// stopped returns the signal with which the thread goes on.
func (t *tracer) stopped(tid int, sig syscall.Signal, event int) syscall.Signal {
	known := t.threads[tid]
	t.threads[tid] = true
	switch {
	case sig == syscall.SIGTRAP && event == unix.PTRACE_EVENT_SECCOMP:
		t.entered(tid)
		return 0
	case sig == syscall.SIGTRAP && event > 0:
		return 0
	case sig == syscall.SIGSTOP && !known: // how a new one begins
		return 0
	}
	return sig
}

func (t *tracer) entered(tid int) {
	if t.process.res.Killed {
		return
	}
	name := describe(tid)
	if name == "" {
		return
	}
	t.process.res.Calls = append(t.process.res.Calls, name)
	if len(t.process.res.Calls) == t.kill {
		t.process.res.Killed = true
		_ = syscall.Kill(t.process.PID, syscall.SIGKILL)
	}
}

// byDescriptor write to what their first argument is open on.
var byDescriptor = map[uint64]string{
	unix.SYS_WRITE: "write", unix.SYS_PWRITE64: "pwrite64", unix.SYS_WRITEV: "writev", unix.SYS_PWRITEV: "pwritev",
	unix.SYS_PWRITEV2: "pwritev2", unix.SYS_FSYNC: "fsync", unix.SYS_FDATASYNC: "fdatasync", unix.SYS_SYNC_FILE_RANGE: "sync_file_range",
	unix.SYS_FTRUNCATE: "ftruncate", unix.SYS_FALLOCATE: "fallocate", unix.SYS_COPY_FILE_RANGE: "copy_file_range",
}

// byName change the tree of files and mounts.
var byName = map[uint64]string{
	unix.SYS_RENAME: "rename", unix.SYS_RENAMEAT: "renameat", unix.SYS_RENAMEAT2: "renameat2",
	unix.SYS_UNLINK: "unlink", unix.SYS_UNLINKAT: "unlinkat", unix.SYS_LINK: "link", unix.SYS_LINKAT: "linkat",
	unix.SYS_SYMLINK: "symlink", unix.SYS_SYMLINKAT: "symlinkat", unix.SYS_MKDIR: "mkdir", unix.SYS_MKDIRAT: "mkdirat",
	unix.SYS_MKNOD: "mknod", unix.SYS_MKNODAT: "mknodat", unix.SYS_MOUNT: "mount", unix.SYS_UMOUNT2: "umount2",
}

// dmIoctl is the type of device-mapper's ioctls, and the commands that change
// nothing: version, list, dependencies, tables, status, wait, versions of targets,
// polling.
const dmIoctl = 0xfd

var dmReads = map[uint64]bool{0: true, 2: true, 7: true, 8: true, 11: true, 12: true, 13: true, 16: true, 17: true}

// Where struct user_regs_struct keeps the number of the call and its arguments.
const (
	offNumber = 15 * 8 // orig_rax
	offFirst  = 14 * 8 // rdi
	offSecond = 13 * 8 // rsi
	offThird  = 12 * 8 // rdx
)

// peek reads one register: user-mode-linux does not give all of them at once.
func peek(tid int, offset uintptr) uint64 {
	var word [8]byte
	if _, err := unix.PtracePeekUser(tid, offset, word[:]); err != nil {
		return math.MaxUint64
	}
	return binary.LittleEndian.Uint64(word[:])
}

// describe names a call that writes, or returns nothing.
func describe(tid int) string {
	number := peek(tid, offNumber)
	if name, ok := byDescriptor[number]; ok {
		path := descriptor(tid, peek(tid, offFirst))
		// Pipes, sockets and files without a name are gone when the process is.
		if !strings.HasPrefix(path, "/") || strings.HasSuffix(path, " (deleted)") || path == os.DevNull {
			return ""
		}
		return name + " " + path
	}
	if name, ok := byName[number]; ok {
		return name
	}
	switch number {
	case unix.SYS_OPENAT:
		if peek(tid, offThird)&unix.O_CREAT != 0 {
			return "openat O_CREAT"
		}
	case unix.SYS_IOCTL:
		request := peek(tid, offSecond)
		if command := request & 0xff; request>>8&0xff == dmIoctl && !dmReads[command] {
			return fmt.Sprintf("ioctl DM %d", command)
		}
	}
	return ""
}

func descriptor(tid int, fd uint64) string {
	path, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", tid, int32(fd)))
	return path
}
