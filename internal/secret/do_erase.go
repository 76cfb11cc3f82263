//go:build goexperiment.runtimesecret

package secret

import (
	"runtime"
	runtimesecret "runtime/secret"

	"golang.org/x/sys/unix"
)

// Erases reports whether [Do] erases what f leaves behind.
const Erases = true

// Do calls f, then erases the registers, the stack and the heap allocations
// that f used. See the package documentation.
func Do(f func()) { runtimesecret.Do(f) }

// Forget erases the heap allocations of every [Do] that has returned. Without it
// they wait for the next garbage collection, which an idle process may put off for
// minutes, and one that ends never does: the kernel then keeps its pages as they
// are until somebody else gets them.
func Forget() { runtime.GC() }

// ForgetThread overwrites what signals that arrived within [Do] left of it on the
// signal stack of the calling thread, where the kernel saves all registers. [Forget]
// has every thread do that, but one that blocks signals does not hear of it, and one
// that ended left its stack as it was: a goroutine that locks itself to a thread to do
// either calls ForgetThread first.
func ForgetThread() {
	// The runtime takes this signal for one of its own that came too late.
	_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGURG)
}
