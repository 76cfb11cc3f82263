//go:build goexperiment.runtimesecret

package secret

import runtimesecret "runtime/secret"

// Erases reports whether [Do] erases what f leaves behind.
const Erases = true

// Do calls f, then erases the registers, the stack and the heap allocations
// that f used. See the package documentation.
func Do(f func()) { runtimesecret.Do(f) }
