//go:build umlguest

package csi

import (
	"crypto/rand"
	"encoding/hex"
	"testing"
)

// The driver alone passes every spec that it can run: what fails with keyagent in front
// of it fails because of keyagent.
func TestFullSanityOfTheDriverAlone(t *testing.T) {
	b := start()
	if got := sanity(t, b.endpoints); got != 52 {
		t.Errorf("%d specs passed, want 52\n%s", got, b)
	}
}

// pattern is what no disk holds by chance.
func pattern() []byte {
	p := make([]byte, 32)
	rand.Read(p)
	return []byte("plaintext " + hex.EncodeToString(p) + " of this test\n")
}

// leaks writes a pattern to a volume, as a pod does, and says whether the
// pattern is seen in the logical volume, and on the disk below it.
func leaks(t *testing.T, e endpoints, name string) (volume, image bool) {
	t.Helper()
	p := pattern()
	v := create(t, dial(t, e), name, 64<<20, block())
	v.publish()
	writeBlocks(t, v.target, p, 1<<20)
	if !found(t, v.target, p) {
		t.Error("the pod does not read what it wrote")
	}
	volume, image = found(t, v.logical(), p), found(t, disk, p)
	v.unpublish()
	return volume, image
}

// Without keyagent the disk holds what a pod writes: so the search would find it.
func TestDriverAloneLeavesPlaintextOnTheDisk(t *testing.T) {
	if volume, image := leaks(t, start().endpoints, "alone"); !volume || !image {
		t.Errorf("found in the logical volume: %v, on the disk: %v", volume, image)
	}
}

// A real kubelet mounts a pod's file system and maps its block device.
func TestFullKubeletOnTheDriverAlone(t *testing.T) {
	b := start()
	if !life(t, b, b.endpoints, "alone", nil) {
		t.Error("what the pod wrote is not found on the disk")
	}
}
