// Package disks holds the tests of a node's volumes on real disks: the released
// program, a key service and software TPMs in a guest whose kernel has dm-crypt.
// Two nodes on one disk are two TPMs, two state folders and two loop devices over
// one image.
package disks
