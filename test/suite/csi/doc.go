// Package csi holds the tests of volumes of a CSI driver that others wrote, TopoLVM,
// in a guest whose kernel has device-mapper: by csi-sanity, by calls of their own, and
// by a real kubelet. The API server that driver and kubelet need runs outside the
// guest, in a network that only the two share.
package csi
