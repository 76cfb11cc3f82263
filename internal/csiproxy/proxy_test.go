package csiproxy

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	registrationv1 "github.com/keyagent/keyagent/api/kubelet/pluginregistration/v1"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/unixsocket"
	"github.com/keyagent/keyagent/luks"
	"github.com/keyagent/keyagent/test/sim/csidriver"
)

func TestAFilesystemIsStagedOnARawDevice(t *testing.T) {
	b := newBed(t, nil)
	must(t, 0, b.stageIt(filesystem(once, "xfs", "noatime,nodiratime", `context="system_u:object_r:x:s0:c1,c2"`)))
	calls := b.driver.Calls()
	if names(calls) != "NodeStageVolume NodePublishVolume" {
		t.Fatalf("the driver was asked %s", names(calls))
	}
	at := b.cfg.private("v")
	staged, published := calls[1].(*csi.NodeStageVolumeRequest), calls[2].(*csi.NodePublishVolumeRequest)
	if staged.GetVolumeCapability().GetBlock() == nil || staged.GetStagingTargetPath() != at.stage || staged.GetSecrets()["password"] != "hunter2" || staged.GetPublishContext()["lun"] != "3" {
		t.Errorf("staged with %v", staged)
	}
	if published.GetVolumeCapability().GetBlock() == nil || published.GetTargetPath() != at.device || published.GetStagingTargetPath() != at.stage || published.GetReadonly() {
		t.Errorf("published with %v", published)
	}
	opened := b.agent.asked()[0].(*nodev1.OpenRequest)
	want := &nodev1.OpenRequest{
		Id: "csi-v", Device: at.device, Format: true, Filesystem: "xfs", MountPoint: b.stage,
		Options: []string{"noatime", "nodiratime", `context="system_u:object_r:x:s0:c1,c2"`},
	}
	if !proto.Equal(opened, want) {
		t.Errorf("opened with %v, want %v", opened, want)
	}
	// Again, as after a crash: a device that is there is not published on top of itself.
	must(t, 0, b.stageIt(filesystem(once, "xfs", "noatime,nodiratime")))
	if names(b.driver.Calls()) != "NodeStageVolume" || names(b.agent.asked()) != "Open" {
		t.Error("the second stage is not the first")
	}
	must(t, 0, b.publishIt(filesystem(once, "xfs", "noatime"), true))
	if b.mounts.at[b.target] != b.stage+" noatime,ro" {
		t.Errorf("%q is mounted", b.mounts.at)
	}
	_ = b.driver.Calls()
	must(t, 0, second(b.node.NodeUnpublishVolume(ctx(), &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: b.target})))
	if len(b.mounts.at) != 0 || names(b.driver.Calls()) != "" {
		t.Error("the driver was asked about what is not its own")
	}
	must(t, 0, b.unstageIt())
	if names(b.driver.Calls()) != "NodeUnpublishVolume NodeUnstageVolume" || exists(at.dir) {
		t.Error("something is left")
	}
	must(t, 0, b.unstageIt())
}

func second[T any](_ T, err error) error { return err }

// A call leaves nothing behind: a proxy serves thousands of them.
func TestNoCallLeavesAnythingRunning(t *testing.T) {
	b := newBed(t, nil)
	round := func() {
		t.Helper()
		if err := b.stageIt(block(csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)); err != nil {
			t.Fatal(err)
		}
		if err := b.unstageIt(); err != nil {
			t.Fatal(err)
		}
	}
	round()
	before := runtime.NumGoroutine()
	for range 50 {
		round()
	}
	after := 0
	for range 100 { // those that are ending end
		if after = runtime.NumGoroutine(); after < before+10 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d goroutines before, %d after 50 stages", before, after)
}

func TestADriverThatDoesNotStage(t *testing.T) {
	b := newBed(t, nil)
	b.driver.Set(func(d *csidriver.Driver) { d.Can = nil })
	must(t, 0, b.stageIt(block(once)))
	calls := b.driver.Calls()
	if names(calls) != "NodePublishVolume" {
		t.Fatalf("the driver was asked %s", names(calls))
	}
	opened := b.agent.asked()[0].(*nodev1.OpenRequest)
	if opened.GetFilesystem() != "none" || opened.GetMountPoint() != "" {
		t.Errorf("opened with %v", opened)
	}
	must(t, 0, b.publishIt(block(once), false))
	if b.mounts.at[b.target] != "/dev/null" {
		t.Errorf("%q is mounted", b.mounts.at)
	}
	must(t, 0, b.unstageIt())
	if names(b.driver.Calls()) != "NodeUnpublishVolume" {
		t.Error("unstaged what was never staged")
	}
}

func TestTheAgentHearsOfASource(t *testing.T) {
	b := newBed(t, nil)
	must(t, 0, b.stageIt(filesystem(once, "xfs"), SourceKey, "handle-of-another"))
	if o := b.agent.asked()[0].(*nodev1.OpenRequest); o.GetSource() != b.cfg.volumeID("handle-of-another") || !o.GetFormat() {
		t.Errorf("opened with %v", o)
	}
	b = newBed(t, nil)
	b.agent.old = true
	wantCode(t, b.stageIt(block(once), SourceKey, "handle-of-another"), codes.Unavailable, "older", "source")
	b = newBed(t, nil)
	b.agent.open = func(*nodev1.OpenRequest, func(string)) error { return status.Error(codes.NotFound, "no such volume") }
	wantCode(t, b.stageIt(block(csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY), SourceKey, "handle-of-another"), codes.Unavailable, "stage it once for writing")
}

func TestADeviceThatIsGoneIsAttachedAgain(t *testing.T) {
	b := newBed(t, nil)
	must(t, 0, b.stageIt(block(once)))
	_ = b.driver.Calls()
	b.mounts.gone = true
	b.driver.Set(func(d *csidriver.Driver) {
		d.Publish = func(r *csi.NodePublishVolumeRequest) error {
			b.mounts.mu.Lock()
			defer b.mounts.mu.Unlock()
			b.mounts.gone = false
			return os.WriteFile(r.GetTargetPath(), nil, 0o600)
		}
	})
	must(t, 0, b.stageIt(block(once)))
	if got := names(b.driver.Calls()); got != "NodeStageVolume NodeUnpublishVolume NodePublishVolume" {
		t.Errorf("the driver was asked %s", got)
	}
}

func TestWhatIsReadByManyIsReadOnly(t *testing.T) {
	const many = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	b := newBed(t, nil)
	must(t, 0, b.stageIt(block(many)))
	if o := b.agent.asked()[0].(*nodev1.OpenRequest); !o.GetReadOnly() || o.GetFormat() {
		t.Errorf("opened with %v", o)
	}
	if p := b.driver.Calls()[2].(*csi.NodePublishVolumeRequest); !p.GetReadonly() {
		t.Errorf("published with %v", p)
	}
	must(t, 0, b.publishIt(block(many), true))
	b = newBed(t, nil)
	must(t, 0, b.stageIt(filesystem(once, "ext4", "noatime,ro")))
	if o := b.agent.asked()[0].(*nodev1.OpenRequest); !o.GetReadOnly() || o.GetFormat() {
		t.Errorf("opened with %v", o)
	}

	b = newBed(t, nil)
	must(t, 0, b.stageIt(block(once)))
	wantCode(t, b.publishIt(block(once), true), codes.FailedPrecondition, "ReadOnlyMany")
	if len(b.mounts.at) != 0 {
		t.Error("published all the same")
	}
}

func TestOnePodHasAVolumeThatIsForOne(t *testing.T) {
	const one = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	b := newBed(t, nil)
	must(t, 0, b.stageIt(block(one)))
	must(t, 0, b.publishIt(block(one), false))
	must(t, 0, b.publishIt(block(one), false))
	first := b.target
	b.target += "2"
	wantCode(t, b.publishIt(block(one), false), codes.FailedPrecondition, "one pod", first)
	must(t, 0, b.publishIt(block(once), false)) // ReadWriteOnce is for all pods of a node
}

func TestSeveralWritersAreRefusedWhereTheyWouldLoseData(t *testing.T) {
	const many = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	b := newBed(t, func(c *Config) { c.SharedClasses = []string{"ocfs2"} })
	for _, refused := range []error{
		b.stageIt(filesystem(many, "ext4")), b.stageIt(filesystem(many, "ext4"), ClassKey, "ocfs2"), b.stageIt(block(many)), b.stageIt(block(many), ClassKey, "other"),
	} {
		wantCode(t, refused, codes.InvalidArgument, "shared_classes")
	}
	if len(b.driver.Calls())+len(b.agent.asked()) != 0 {
		t.Error("somebody was asked")
	}
	must(t, 0, b.stageIt(block(many), ClassKey, "ocfs2"))
}

func TestOnlyTheConfigurationLeavesAVolumeInPlain(t *testing.T) {
	for name, tt := range map[string]struct {
		context []string
		plain   bool
	}{
		"no class": {nil, false}, "a class that is not listed": {[]string{ClassKey, "fast"}, false}, "an empty class": {[]string{ClassKey, ""}, false},
		"another key": {[]string{"keyagent.Class", "scratch"}, false}, "one that is listed": {[]string{ClassKey, "scratch"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, func(c *Config) { c.PlainClasses = []string{"scratch"} })
			must(t, 0, b.stageIt(filesystem(once, "ext4"), tt.context...))
			stage := b.driver.Calls()[1].(*csi.NodeStageVolumeRequest)
			if plain := stage.GetStagingTargetPath() == b.stage && len(b.agent.asked()) == 0; plain != tt.plain {
				t.Errorf("plain %v", plain)
			}
		})
	}
	b := newBed(t, func(c *Config) { c.PlainClasses = []string{"scratch"} })
	context := map[string]string{ClassKey: "scratch"}
	must(t, 0, second(b.node.NodePublishVolume(ctx(), &csi.NodePublishVolumeRequest{VolumeId: "v", StagingTargetPath: b.stage, TargetPath: b.target, VolumeCapability: filesystem(once, ""), VolumeContext: context})))
	must(t, 0, second(b.node.NodeUnpublishVolume(ctx(), &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: b.target})))
	must(t, 0, b.unstageIt())
	if got := names(b.driver.Calls()); got != "NodePublishVolume NodeUnpublishVolume NodeUnstageVolume" {
		t.Errorf("the driver was asked %s", got)
	}
	// A class that is changed while the volume is up.
	b = newBed(t, func(c *Config) { c.PlainClasses = []string{"scratch"} })
	must(t, 0, b.stageIt(filesystem(once, "ext4")))
	_ = b.driver.Calls()
	wantCode(t, b.stageIt(filesystem(once, "ext4"), ClassKey, "scratch"), codes.FailedPrecondition, "plain")
	if names(b.driver.Calls()) != "" {
		t.Error("the driver was asked")
	}
	// A volume of a pod, without a claim.
	_, err := b.node.NodePublishVolume(ctx(), &csi.NodePublishVolumeRequest{VolumeId: "v", TargetPath: b.target, VolumeCapability: filesystem(once, ""), VolumeContext: map[string]string{"csi.storage.k8s.io/ephemeral": "true"}})
	wantCode(t, err, codes.FailedPrecondition, "ephemeral")
}

// An older agent would make a volume without integrity, for good.
func TestAnAgentThatDoesNotKnowIntegrityIsNotAsked(t *testing.T) {
	b := newBed(t, func(c *Config) { c.Integrity = string(luks.HMACSHA256) })
	b.agent.old = true
	wantCode(t, b.stageIt(block(once)), codes.Unavailable, "older", "upgrade it")
	if calls := b.agent.asked(); len(calls) != 0 {
		t.Errorf("the agent was asked for %v", calls)
	}
	b.agent.old = false
	must(t, 0, b.stageIt(block(once)))
	if r := b.agent.asked()[0].(*nodev1.OpenRequest); r.GetIntegrity() != "hmac-sha256" {
		t.Errorf("the agent was asked for %v", r)
	}
	_, err := b.node.NodeExpandVolume(ctx(), &csi.NodeExpandVolumeRequest{VolumeId: "v", VolumePath: b.cfg.Kubelet + "/stage"})
	if err == nil {
		t.Error("it grows")
	}
}

func TestAnErrorOpensNothing(t *testing.T) {
	held := failure.Status(&failure.Error{Class: failure.Held, CorrelationID: "c-1", Hint: "keyagent volume takeover"}, "volume is held by node-2")
	b := newBed(t, nil)
	b.agent.open = func(*nodev1.OpenRequest, func(string)) error { return held }
	// Not a code that is final: the device is attached, and has to be unstaged.
	wantCode(t, b.stageIt(block(once)), codes.Unavailable, "keyagent: volume held", "node-2", "c-1", "takeover")
	wantCode(t, b.publishIt(block(once), false), codes.FailedPrecondition, "not staged")
	if len(b.mounts.at) != 0 {
		t.Error("published all the same")
	}

	b = newBed(t, nil)
	b.driver.Set(func(d *csidriver.Driver) {
		d.Fail = map[string]error{"NodePublishVolumeRequest": status.Error(codes.ResourceExhausted, "too many disks")}
	})
	wantCode(t, b.stageIt(block(once)), codes.ResourceExhausted, "driver: NodePublishVolume", "too many disks")
	b.driver.Set(func(d *csidriver.Driver) { d.Fail, d.Publish = nil, nil })
	wantCode(t, b.stageIt(block(once)), codes.Unavailable, "no block device")
	if len(b.agent.asked()) != 0 {
		t.Error("the agent was asked for a device that is not there")
	}

	b = newBed(t, nil)
	must(t, 0, b.stageIt(block(once)))
	_ = b.driver.Calls()
	b.agent.close = failure.Status(failure.Newf(failure.DeviceBusy, "", "busy"), "in use by pid 7")
	wantCode(t, b.unstageIt(), codes.FailedPrecondition, "pid 7")
	if names(b.driver.Calls()) != "" {
		t.Error("the device of an open volume was taken away")
	}
	b.agent.close = failure.Status(failure.Newf(failure.NotFound, "", "unknown"), "unknown")
	b.mounts.held = []string{"other", "csi-v"}
	wantCode(t, b.unstageIt(), codes.FailedPrecondition, "csi-v")
	if names(b.driver.Calls()) != "" {
		t.Error("the device below a mapping was taken away")
	}
	b.mounts.held = []string{"other"}
	must(t, 0, b.unstageIt())
}

func TestPathsAndNamesOfStrangersAreRefused(t *testing.T) {
	b := newBed(t, nil)
	for _, path := range []string{"", "/etc", "relative", b.cfg.Kubelet, b.cfg.Kubelet + "/../etc", b.cfg.Kubelet + "x/y", b.cfg.Kubelet + "/a//b", b.cfg.Kubelet + "/a\x00b", b.cfg.Kubelet + strings.Repeat("/a", 3000)} {
		_, err := b.node.NodeStageVolume(ctx(), &csi.NodeStageVolumeRequest{VolumeId: "v", StagingTargetPath: path, VolumeCapability: block(once)})
		wantCode(t, err, codes.InvalidArgument, "staging_target_path")
		_, err = b.node.NodeUnpublishVolume(ctx(), &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: path})
		wantCode(t, err, codes.InvalidArgument, "target_path")
	}
	for _, id := range []string{"", "a\x00b", strings.Repeat("a", maxHandle+1)} {
		_, err := b.node.NodeUnstageVolume(ctx(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: b.stage})
		wantCode(t, err, codes.InvalidArgument, "volume_id")
	}
	wantCode(t, b.stageIt(nil), codes.InvalidArgument, "volume_capability")
	wantCode(t, b.stageIt(block(csi.VolumeCapability_AccessMode_UNKNOWN)), codes.InvalidArgument, "access_mode")
	if len(b.driver.Calls())+len(b.agent.asked()) != 0 {
		t.Error("somebody was asked")
	}
}

func TestOneThingAtATimeIsDoneToAVolume(t *testing.T) {
	b := newBed(t, nil)
	begun, goOn := make(chan struct{}), make(chan struct{})
	b.agent.open = func(_ *nodev1.OpenRequest, step func(string)) error {
		step("formatted")
		close(begun)
		<-goOn
		return nil
	}
	first := make(chan error, 1)
	go func() { first <- b.stageIt(block(once)) }()
	<-begun
	// A question that waits until shortly before its caller goes away.
	short, cancel := context.WithTimeout(ctx(), 200*time.Millisecond)
	defer cancel()
	r := &csi.NodeStageVolumeRequest{VolumeId: "v", StagingTargetPath: b.stage, VolumeCapability: block(once), Secrets: map[string]string{"password": "hunter2"}, PublishContext: map[string]string{"lun": "3"}}
	_, err := b.node.NodeStageVolume(short, r)
	wantCode(t, err, codes.Aborted, "last step: formatted")
	wantCode(t, b.unstageIt(), codes.Aborted, "busy")
	wantCode(t, b.stageIt(filesystem(once, "ext4")), codes.Aborted, "busy")
	close(goOn)
	must(t, 0, <-first)
	if names(b.agent.asked()) != "Open" {
		t.Error("it was opened twice")
	}
	must(t, 0, b.unstageIt())
}

func TestADriverThatHangsHoldsNothingForEver(t *testing.T) {
	b := newImpatientBed(t, 100*time.Millisecond, nil)
	hangs := make(chan struct{})
	t.Cleanup(func() { close(hangs) })
	b.driver.Set(func(d *csidriver.Driver) {
		d.Publish = func(*csi.NodePublishVolumeRequest) error { <-hangs; return nil }
	})
	wantCode(t, b.stageIt(block(once)), codes.DeadlineExceeded, "NodePublishVolume")
	wantCode(t, b.stageIt(block(once)), codes.DeadlineExceeded) // not Aborted: nothing is under way
}

func TestAVolumeGrowsByWhatItHasInTheStorage(t *testing.T) {
	b := newBed(t, nil)
	b.driver.Set(func(d *csidriver.Driver) { d.Can = append(d.Can, csi.NodeServiceCapability_RPC_EXPAND_VOLUME) })
	must(t, 0, b.stageIt(block(once)))
	_ = b.driver.Calls()
	r := &csi.NodeExpandVolumeRequest{VolumeId: "v", VolumePath: b.stage, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 << 20}}
	_, err := b.node.NodeExpandVolume(ctx(), r)
	wantCode(t, err, codes.NotFound)
	must(t, 0, os.Mkdir(b.stage, 0o700))
	a, err := b.node.NodeExpandVolume(ctx(), r)
	if err != nil || a.GetCapacityBytes() != 3<<20 {
		t.Fatalf("%v, %v", a, err)
	}
	var raw *csi.NodeExpandVolumeRequest
	for _, c := range b.driver.Calls() {
		if e, ok := c.(*csi.NodeExpandVolumeRequest); ok {
			raw = e
		}
	}
	if raw.GetVolumePath() != b.cfg.private("v").device || raw.GetCapacityRange() != nil || raw.GetVolumeCapability().GetBlock() == nil {
		t.Errorf("the driver was asked %v", raw)
	}
	r.CapacityRange.RequiredBytes = 3<<20 + luks.DataOffset // of a controller without a proxy
	must(t, 0, second(b.node.NodeExpandVolume(ctx(), r)))
	r.CapacityRange.RequiredBytes++
	_, err = b.node.NodeExpandVolume(ctx(), r)
	wantCode(t, err, codes.Unavailable, "the device is not larger yet")
	b.agent.resize = failure.Status(failure.Newf(failure.Unreachable, "", "down"), "the key service is down")
	_, err = b.node.NodeExpandVolume(ctx(), r)
	wantCode(t, err, codes.Unavailable, "key service is down")
}

func TestStatsAreThoseOfTheMountedFilesystem(t *testing.T) {
	b := newBed(t, nil)
	must(t, 0, b.stageIt(filesystem(once, "")))
	r := &csi.NodeGetVolumeStatsRequest{VolumeId: "v"}
	wantCode(t, second(b.node.NodeGetVolumeStats(ctx(), r)), codes.InvalidArgument, "volume_path")
	wantCode(t, second(b.node.NodeExpandVolume(ctx(), &csi.NodeExpandVolumeRequest{VolumeId: "v"})), codes.InvalidArgument, "volume_path")
	r.VolumePath = "/etc"
	wantCode(t, second(b.node.NodeGetVolumeStats(ctx(), r)), codes.NotFound)
	wantCode(t, second(b.node.NodeExpandVolume(ctx(), &csi.NodeExpandVolumeRequest{VolumeId: "v", VolumePath: "/etc"})), codes.NotFound)
	r.VolumePath = b.target
	_, err := b.node.NodeGetVolumeStats(ctx(), r)
	wantCode(t, err, codes.NotFound)
	must(t, 0, os.Mkdir(b.target, 0o700))
	a, err := b.node.NodeGetVolumeStats(ctx(), r)
	if err != nil || a.GetUsage()[0].GetTotal() <= 0 || a.GetUsage()[0].GetUnit() != csi.VolumeUsage_BYTES {
		t.Errorf("%v, %v", a, err)
	}
}

func TestCapabilitiesAreTheProxysOwn(t *testing.T) {
	b := newBed(t, nil)
	b.driver.Set(func(d *csidriver.Driver) {
		d.Can = []csi.NodeServiceCapability_RPC_Type{csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP, csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER, csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH, 99}
	})
	a, err := b.node.NodeGetCapabilities(ctx(), &csi.NodeGetCapabilitiesRequest{})
	var got []string
	for _, c := range a.GetCapabilities() {
		got = append(got, c.GetRpc().GetType().String())
	}
	if want := []string{"STAGE_UNSTAGE_VOLUME", "GET_VOLUME_STATS", "EXPAND_VOLUME", "SINGLE_NODE_MULTI_WRITER"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	info, err := b.node.NodeGetInfo(ctx(), &csi.NodeGetInfoRequest{})
	if err != nil || info.GetNodeId() != "node-1" || info.GetAccessibleTopology().GetSegments()["zone"] != "z" {
		t.Errorf("%v, %v", info, err)
	}
	// What is new in the node's service could lead round.
	err = b.conn.Invoke(ctx(), "/csi.v1.Node/NodeMigrateVolume", &csi.NodeGetInfoRequest{}, &csi.NodeGetInfoResponse{})
	wantCode(t, err, codes.Unimplemented)
	err = b.conn.Invoke(ctx(), "/csi.v1.Node/NodeGetVolumeHealth", &csi.NodeGetVolumeHealthRequest{}, &csi.NodeGetVolumeHealthResponse{})
	wantCode(t, err, codes.Unimplemented)
	err = b.conn.Invoke(ctx(), "/other.Service/Call", &csi.NodeGetInfoRequest{}, &csi.NodeGetInfoResponse{})
	wantCode(t, err, codes.Unimplemented)
}

func TestADeviceThatIsLeftIsNotTrusted(t *testing.T) {
	b := newBed(t, nil)
	// The first stage failed, and by now the number of the device may be another disk's.
	b.agent.open = func(*nodev1.OpenRequest, func(string)) error {
		return failure.Status(failure.Newf(failure.PolicyDenied, "", "no grant"), "no grant")
	}
	wantCode(t, b.stageIt(block(once)), codes.Unavailable, "no grant")
	_ = b.driver.Calls()
	b.agent.open = nil
	must(t, 0, b.stageIt(block(once)))
	if got := names(b.driver.Calls()); got != "NodeStageVolume NodeUnpublishVolume NodePublishVolume" {
		t.Errorf("the driver was asked %s", got)
	}
	// Another driver's volume of that name.
	b.agent.mu.Lock()
	b.agent.volumes["csi-v"].Device = "/dev/other"
	b.agent.mu.Unlock()
	_ = b.agent.asked()
	wantCode(t, b.unstageIt(), codes.FailedPrecondition, "two prefixes")
	wantCode(t, b.stageIt(block(once)), codes.Unavailable, "two prefixes")
	if len(b.agent.asked()) != 0 {
		t.Error("it was closed, or opened")
	}
}

func TestAFolderThatSomebodyRemovedMakesNoPlainVolume(t *testing.T) {
	b := newBed(t, nil)
	must(t, 0, b.stageIt(block(once)))
	must(t, 0, os.RemoveAll(b.cfg.private("v").dir))
	_ = b.driver.Calls()
	must(t, 0, b.unstageIt())
	if got := names(b.agent.asked()); got != "Open Close" || names(b.driver.Calls()) != "" {
		t.Errorf("the agent was asked %s", got)
	}
}

func TestKubeletsRefusalEndsTheProxy(t *testing.T) {
	b := newBed(t, func(c *Config) {
		c.Registration = filepath.Join(c.Kubelet, "reg.sock")
		c.Listen = filepath.Join(c.Kubelet, "second.sock")
	})
	ended := make(chan error, 1)
	serving := make(chan struct{})
	b.cfg.Listen += "2"
	go func() { ended <- b.Serve(t.Context(), func() { close(serving) }) }()
	<-serving
	conn := must(t, err2(grpc.NewClient("unix:"+b.cfg.Registration, grpc.WithTransportCredentials(unixsocket.Credentials(nil)))), nil)
	t.Cleanup(func() { _ = conn.Close() })
	client := registrationv1.NewRegistrationClient(conn)
	must(t, 0, second(client.NotifyRegistrationStatus(ctx(), &registrationv1.RegistrationStatus{PluginRegistered: true})))
	_, _ = client.NotifyRegistrationStatus(ctx(), &registrationv1.RegistrationStatus{Error: "another driver has the name"})
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "another driver has the name") {
		t.Errorf("it ended with %v", err)
	}
}

func TestTheProxyRegistersItself(t *testing.T) {
	b := newBed(t, nil)
	info, err := registration{Proxy: b.Proxy}.GetInfo(ctx(), nil)
	if err != nil || info.GetName() != "test.example" || info.GetType() != "CSIPlugin" || info.GetEndpoint() != b.cfg.Listen {
		t.Errorf("%v, %v", info, err)
	}
}
