//go:build umlguest

package csi

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// volume is one of a driver's, as a kubelet sees it.
type volume struct {
	t          testing.TB
	d          *driver
	id         string
	context    map[string]string
	capability *csi.VolumeCapability
	staging    string
	target     string
}

// block and filesystem are how a pod may want a volume.
func block() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	}
}

func filesystem(kind string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: kind}},
	}
}

// callTime bounds one call: a kubelet's own is two minutes.
const callTime = 2 * time.Minute

// call asks for what must succeed.
func call[Q, A any](t testing.TB, f func(context.Context, Q, ...grpc.CallOption) (A, error), q Q) A {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTime)
	defer cancel()
	return must[A](t)(f(ctx, q))
}

// create makes a volume, which ends with the test.
func create(t testing.TB, d *driver, name string, size int64, capability *csi.VolumeCapability) *volume {
	t.Helper()
	return createOf(t, d, name, size, capability, nil)
}

// createOf makes one that begins with what another volume, or a snapshot, holds.
func createOf(t testing.TB, d *driver, name string, size int64, capability *csi.VolumeCapability, of *csi.VolumeContentSource) *volume {
	t.Helper()
	rsp := call(t, d.controller.CreateVolume, &csi.CreateVolumeRequest{
		Name: name, Parameters: thin, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{capability}, VolumeContentSource: of,
	})
	dir := place(t)
	v := &volume{
		t: t, d: d, id: rsp.Volume.VolumeId, context: rsp.Volume.VolumeContext, capability: capability,
		staging: filepath.Join(dir, "staging"), target: filepath.Join(dir, "target"),
	}
	check(t, os.Mkdir(v.staging, 0o750))
	t.Cleanup(func() { call(t, d.controller.DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: v.id}) })
	return v
}

// place is a folder where kubelet keeps volumes: keyagent takes no path elsewhere.
func place(t testing.TB) string {
	t.Helper()
	dir := must[string](t)(os.MkdirTemp(kubeletDir, "test-"))
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// publish gives a pod its volume, at v.target.
func (v *volume) publish() {
	v.t.Helper()
	q := &csi.NodePublishVolumeRequest{VolumeId: v.id, TargetPath: v.target, VolumeCapability: v.capability, VolumeContext: v.context}
	if v.d.stages {
		q.StagingTargetPath = v.staging
		call(v.t, v.d.node.NodeStageVolume, &csi.NodeStageVolumeRequest{
			VolumeId: v.id, StagingTargetPath: v.staging, VolumeCapability: v.capability, VolumeContext: v.context,
		})
	}
	call(v.t, v.d.node.NodePublishVolume, q)
}

// unpublish takes the volume from the pod.
func (v *volume) unpublish() {
	v.t.Helper()
	call(v.t, v.d.node.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target})
	if v.d.stages {
		call(v.t, v.d.node.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging})
	}
	if _, err := os.Lstat(v.target); !errors.Is(err, os.ErrNotExist) {
		v.t.Errorf("the target is still there: %v", err)
	}
}

// logical is the path of the logical volume that holds the volume: what a thief of the
// disk, or its host, reads.
func (v *volume) logical() string { return "/dev/" + group + "/" + v.id }

// writeBlocks fills part of a device with a pattern, down to the disk.
func writeBlocks(t testing.TB, path string, pattern []byte, size int) {
	t.Helper()
	f := must[*os.File](t)(os.OpenFile(path, os.O_WRONLY, 0))
	_, err := f.Write(bytes.Repeat(pattern, size/len(pattern)))
	check(t, errors.Join(err, f.Sync(), f.Close()))
}

// found says whether a pattern stands anywhere on a device or in an image, read from
// where it lies and not from memory.
func found(t testing.TB, path string, pattern []byte) bool {
	t.Helper()
	f := must[*os.File](t)(os.Open(path))
	defer f.Close()
	if info := must[os.FileInfo](t)(f.Stat()); info.Mode()&os.ModeDevice != 0 {
		check(t, unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0))
	}
	buf := make([]byte, 1<<20)
	for at := int64(0); ; {
		// Over holes: an image has many.
		if next, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA); errors.Is(err, syscall.ENXIO) {
			return false
		} else if err == nil {
			at = next
		}
		n, err := f.ReadAt(buf, at)
		if bytes.Contains(buf[:n], pattern) {
			return true
		}
		if err == io.EOF {
			return false
		}
		check(t, err)
		at += int64(n - len(pattern) + 1)
	}
}
