//go:build umlguest

package csi

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// TestProxyRestoresSnapshots: of a volume that a pod uses a snapshot is taken, and restored
// beside it; the volume is cloned; both hold what it held, and go their own ways.
func TestProxyRestoresSnapshots(t *testing.T) {
	s := shielded()
	d := dial(t, s.endpoints)
	for name, capability := range map[string]*csi.VolumeCapability{"xfs": filesystem("xfs"), "block": block()} {
		t.Run(name, func(t *testing.T) {
			file := func(v *volume) string {
				if name == "block" {
					return v.target
				}
				return filepath.Join(v.target, "note")
			}
			write := func(v *volume, text string) {
				t.Helper()
				f := must[*os.File](t)(os.OpenFile(file(v), os.O_RDWR|os.O_CREATE, 0o600))
				_, err := f.WriteAt([]byte(text), 0)
				check(t, errors.Join(err, f.Sync(), f.Close()))
			}
			holds := func(v *volume, want string) {
				t.Helper()
				f := must[*os.File](t)(os.Open(file(v)))
				defer f.Close()
				got := make([]byte, len(want))
				if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, []byte(want)) {
					t.Errorf("%s holds %q, %v, want %q", v.id, got, err, want)
				}
			}
			const size = 400 << 20
			from := create(t, d, name+"-from", size, capability)
			from.publish()
			write(from, "before")
			tool(t, "sync")
			rsp := call(t, d.controller.CreateSnapshot, &csi.CreateSnapshotRequest{Name: name + "-snapshot", SourceVolumeId: from.id})
			snapshot := rsp.GetSnapshot().GetSnapshotId()
			t.Logf("the snapshot is called %s", snapshot)
			t.Cleanup(func() { call(t, d.controller.DeleteSnapshot, &csi.DeleteSnapshotRequest{SnapshotId: snapshot}) })
			write(from, "after ")
			restored := createOf(t, d, name+"-restored", size, capability, &csi.VolumeContentSource{
				Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}})
			cloned := createOf(t, d, name+"-cloned", size+64<<20, capability, &csi.VolumeContentSource{
				Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: from.id}}})
			for v, want := range map[*volume]string{restored: "before", cloned: "after "} {
				v.publish() // while its source is in use
				holds(v, want)
				write(v, "mine  ")
				v.unpublish()
				v.publish()
				holds(v, "mine  ")
				v.unpublish()
			}
			holds(from, "after ")
			from.unpublish()
		})
	}
}
