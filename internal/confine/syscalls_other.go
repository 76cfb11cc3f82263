//go:build !amd64 && !arm64

package confine

// Syscalls has no list of this processor's calls.
func Syscalls(Work) (bool, error) { return false, nil }
