//go:build amd64 || arm64

package confine

import "golang.org/x/sys/unix"

// A group is system calls that are refused to every role but some.
type group struct {
	allowed []Work
	calls   []uint32
}

// refused is the list. Its calls exist on each architecture; calls that only one of them
// has are in [own].
var refused = []group{
	// No role: other processes' memory, the kernel itself, the clock, raw hardware, and
	// system calls that are new, large and known for their holes.
	{nil, []uint32{
		unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_GETFD,
		unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_REBOOT,
		unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
		unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_VMSPLICE, unix.SYS_LOOKUP_DCOOKIE,
		unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_FANOTIFY_INIT, unix.SYS_ACCT, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD,
		unix.SYS_NFSSERVCTL, unix.SYS_VHANGUP, unix.SYS_SYSLOG, unix.SYS_PERSONALITY,
		unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_CLOCK_ADJTIME, unix.SYS_ADJTIMEX,
		unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	}},
	// Namespaces and ways of mounting that this program does not use.
	{[]Work{Commands}, []uint32{
		unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT,
		unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK,
		unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_MOUNT_SETATTR,
	}},
	{[]Work{Volumes, Commands}, []uint32{unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL}},
	{[]Work{Volumes}, []uint32{unix.SYS_SWAPON, unix.SYS_SWAPOFF}},
}

// absent are calls of which the kernel is made to say that it does not have them: who uses
// them has another way for such a kernel.
var absent = []uint32{unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER}

// namespaces are the flags of clone(2) that make one. clone3(2), whose flags a filter
// cannot see, is absent where these are refused; C libraries then use clone(2).
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET
