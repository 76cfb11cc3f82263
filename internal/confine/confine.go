// Package confine takes from this process what its role never needs: system calls
// ([Syscalls], by seccomp) and files ([Files], by landlock). It is a second fence behind
// the units of systemd, and the only one where no unit stands: in a container, in an
// initrd, after a start by hand. What is taken is taken from every thread and every
// child, and cannot be had back.
//
// The shipped units refuse all system calls that are refused here. Two things are left to
// the units: the agent's files, since a process with a landlock domain cannot mount; and
// the files of a role that runs commands of the operator's, who alone knows what those
// read and write.
//
// A kernel that has neither is no error, and the caller logs it. A kernel that has them
// and does not do as it is told is one: see [ErrRefused].
package confine

import "errors"

// ErrRefused means that the kernel knows how to confine a process and would not.
var ErrRefused = errors.New("the process could not be confined")

// Work is what a role does that not every role does.
type Work int

const (
	// Keys is the work of a process that neither mounts nor runs commands.
	Keys Work = iota
	// Volumes also mounts, swaps and uses the kernel's keyrings, for itself and for mkfs
	// and fsck.
	Volumes
	// Commands also runs what an operator configured, such as a program that builds a
	// sandbox or reads the kernel's keyring.
	Commands
)
