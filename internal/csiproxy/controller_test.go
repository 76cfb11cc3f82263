package csiproxy

import (
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/keyagent/keyagent/luks"
)

func TestSizesAreWithoutTheHeader(t *testing.T) {
	b := newBed(t, func(c *Config) { c.PlainClasses = []string{"scratch"} })
	controller := csi.NewControllerClient(b.conn)
	create := func(parameters map[string]string) (*csi.CreateVolumeRequest, *csi.Volume) {
		a, err := controller.CreateVolume(ctx(), &csi.CreateVolumeRequest{
			Name: "n", Parameters: parameters, VolumeCapabilities: []*csi.VolumeCapability{filesystem(once, "ext4")},
			CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 30, LimitBytes: 2 << 30},
		})
		must(t, 0, err)
		return b.driver.Calls()[0].(*csi.CreateVolumeRequest), a.GetVolume()
	}
	r, v := create(map[string]string{"type": "ssd", ClassKey: "gold"})
	if r.GetCapacityRange().GetRequiredBytes() != 1<<30+luks.DataOffset || r.GetCapacityRange().GetLimitBytes() != 2<<30+luks.DataOffset || r.GetVolumeCapabilities()[0].GetBlock() == nil || len(r.GetParameters()) != 1 {
		t.Errorf("the driver was asked %v", r)
	}
	if v.GetCapacityBytes() != 1<<30 || v.GetVolumeContext()[ClassKey] != "gold" || v.GetVolumeContext()["disk"] != "n" {
		t.Errorf("answered %v", v)
	}
	r, v = create(map[string]string{ClassKey: "scratch"})
	if r.GetCapacityRange().GetRequiredBytes() != 1<<30 || r.GetVolumeCapabilities()[0].GetMount() == nil || v.GetCapacityBytes() != 1<<30 || v.GetVolumeContext()[ClassKey] != "scratch" {
		t.Errorf("a plain volume: %v, %v", r, v)
	}
	e, err := controller.ControllerExpandVolume(ctx(), &csi.ControllerExpandVolumeRequest{VolumeId: "v", CapacityRange: &csi.CapacityRange{RequiredBytes: 3 << 30}})
	if err != nil || e.GetCapacityBytes() != 3<<30 || !e.GetNodeExpansionRequired() {
		t.Errorf("%v, %v", e, err)
	}
	s, err := controller.CreateSnapshot(ctx(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: "v"})
	if err != nil || s.GetSnapshot().GetSizeBytes() != 1<<30-luks.DataOffset {
		t.Errorf("%v, %v", s, err)
	}
	_, err = controller.DeleteVolume(ctx(), &csi.DeleteVolumeRequest{VolumeId: "v"})
	must(t, 0, err)
	_, err = controller.ListVolumes(ctx(), &csi.ListVolumesRequest{})
	wantCode(t, err, codes.Unimplemented)
}

// With integrity a volume has tags and a journal as well, and still what was asked for.
func TestSizesAreWithoutTheTags(t *testing.T) {
	b := newBed(t, func(c *Config) { c.Integrity = string(luks.HMACSHA256) })
	controller := csi.NewControllerClient(b.conn)
	for _, want := range []int64{1 << 20, 1<<30 + 1, 1 << 40} {
		a, err := controller.CreateVolume(ctx(), &csi.CreateVolumeRequest{
			Name: "n", VolumeCapabilities: []*csi.VolumeCapability{filesystem(once, "xfs")},
			CapacityRange: &csi.CapacityRange{RequiredBytes: want},
		})
		must(t, 0, err)
		asked := b.driver.Calls()[0].(*csi.CreateVolumeRequest).GetCapacityRange().GetRequiredBytes()
		if tags := asked - luks.DataOffset - want; tags < want/128 || tags > want/64+2<<20 {
			t.Errorf("for %d bytes the driver is asked for %d", want, asked)
		}
		if got := a.GetVolume().GetCapacityBytes(); got < want || got > want+4095 {
			t.Errorf("for %d bytes the answer is %d", want, got)
		}
	}
	_, err := controller.ControllerExpandVolume(ctx(), &csi.ControllerExpandVolumeRequest{VolumeId: "v", CapacityRange: &csi.CapacityRange{RequiredBytes: 3 << 30}})
	wantCode(t, err, codes.FailedPrecondition, "does not grow")
	if calls := b.driver.Calls(); len(calls) != 0 {
		t.Errorf("the driver was asked %v", calls)
	}
}

func TestADriverMayAnswerNothing(t *testing.T) {
	for method, r := range rewrites {
		q, a := r.newRequest(), r.newAnswer()
		r.request(&Config{}, q)
		if r.answer != nil {
			r.answer(&Config{}, q, a)
		}
		if !passes(method) {
			t.Errorf("%s does not pass", method)
		}
	}
}

// What is made of a volume, or of its snapshot, is known by its source on the node, and the
// driver sees the names that it gave.
func TestAVolumeRemembersItsSource(t *testing.T) {
	b := newBed(t, func(c *Config) { c.PlainClasses = []string{"scratch"} })
	controller := csi.NewControllerClient(b.conn)
	const odd = "vol@keyagent:1/ä"
	s, err := controller.CreateSnapshot(ctx(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: odd})
	must(t, 0, err)
	named := s.GetSnapshot().GetSnapshotId()
	b.driver.Calls()
	snapshot := func(id string) *csi.VolumeContentSource {
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
	}
	volume := &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: "v"}}}
	for _, tt := range []struct {
		name    string
		of      *csi.VolumeContentSource
		class   string
		source  string
		atFirst string // name of the snapshot that the driver sees
	}{
		{"nothing", nil, "", "", ""},
		{"volume", volume, "", "v", ""},
		{"snapshot", snapshot(named), "", odd, "s"},
		{"a snapshot of before", snapshot("s-1"), "", "", "s-1"},
		{"a bad suffix", snapshot("s@keyagent:%zz"), "", "", "s@keyagent:%zz"},
		{"plain", snapshot(named), "scratch", "", "s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, err := controller.CreateVolume(ctx(), &csi.CreateVolumeRequest{
				Name: "n", VolumeContentSource: tt.of, Parameters: map[string]string{ClassKey: tt.class},
				VolumeCapabilities: []*csi.VolumeCapability{filesystem(once, "ext4")},
			})
			must(t, 0, err)
			asked := b.driver.Calls()[0].(*csi.CreateVolumeRequest)
			if got := asked.GetVolumeContentSource().GetSnapshot().GetSnapshotId(); got != tt.atFirst {
				t.Errorf("the driver was asked for %q, want %q", got, tt.atFirst)
			}
			if got := a.GetVolume().GetVolumeContext()[SourceKey]; got != tt.source {
				t.Errorf("its source is %q, want %q", got, tt.source)
			}
		})
	}
	_, err = controller.DeleteSnapshot(ctx(), &csi.DeleteSnapshotRequest{SnapshotId: named})
	must(t, 0, err)
	if got := b.driver.Calls()[0].(*csi.DeleteSnapshotRequest).GetSnapshotId(); got != "s" {
		t.Errorf("the driver was asked to delete %q", got)
	}
	for id, want := range map[string][2]string{
		"s": {"s", ""}, "": {"", ""}, "a@keyagent:": {"a@keyagent:", ""}, "@keyagent:v": {"", "v"}, "a@keyagent:b@keyagent:c": {"a@keyagent:b", "c"},
	} {
		if a, b := ofSource(id); a != want[0] || b != want[1] {
			t.Errorf("%q is %q of %q", id, a, b)
		}
	}
}
