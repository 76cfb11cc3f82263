// Package csiproxy stands between kubelet and the node socket of any CSI driver, and
// encrypts what the driver attaches. The driver is asked for raw block alone, at a path
// that belongs to the proxy; the agent opens that device as a volume; what kubelet asked
// for, a filesystem or a block device, comes from the volume. Keys never pass through here.
//
// It keeps no state of its own: what is mounted and mapped is the kernel's word, what a
// volume is the agent's. So each call can be repeated, by another process too, after a
// crash at any point.
package csiproxy
