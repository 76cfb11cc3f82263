//go:build goexperiment.runtimesecret

package secret

import (
	"runtime"
	runtimesecret "runtime/secret"
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
