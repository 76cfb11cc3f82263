// Package luks boots the guest's half of package luks' own tests: those with the tag
// umlguest, which need a kernel with dm-crypt, and a benchmark beside cryptsetup.
package luks
