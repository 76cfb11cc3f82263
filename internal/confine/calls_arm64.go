package confine

import "golang.org/x/sys/unix"

// architecture is the only one whose calls the filter lets through. This processor may
// also run the calls of 32-bit ARM.
const (
	architecture = unix.AUDIT_ARCH_AARCH64
	x32          = 0 // there is no such thing
)

var own []uint32
