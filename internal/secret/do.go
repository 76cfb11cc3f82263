//go:build !goexperiment.runtimesecret

package secret

// Erases reports whether [Do] erases what f leaves behind.
const Erases = false

// Do calls f. See the package documentation.
func Do(f func()) { f() }

// Forget does nothing in this build. See the package documentation.
func Forget() {}

// ForgetThread does nothing in this build. See the package documentation.
func ForgetThread() {}
