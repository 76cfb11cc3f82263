package unixsocket

// Overflow is the user that the kernel names where it has no number for a caller
// (/proc/sys/kernel/overflowuid): each user of a foreign user namespace that is not
// mapped into this one.
const Overflow = 65534

// OverflowAdvice says so to people who let it in.
const OverflowAdvice = "user 65534 also stands for every user of a container's user namespace that this machine does not know; let a user of its own call"
