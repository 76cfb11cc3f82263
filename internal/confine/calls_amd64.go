package confine

import "golang.org/x/sys/unix"

// architecture is the only one whose calls the filter lets through. This processor also
// runs the calls of i386, and those of x32, which are numbered from x32 on.
const (
	architecture = unix.AUDIT_ARCH_X86_64
	x32          = 0x40000000
)

var own = []uint32{unix.SYS_IOPL, unix.SYS_IOPERM, unix.SYS_MODIFY_LDT, unix.SYS_SYSFS, unix.SYS_USTAT, unix.SYS_USELIB}
