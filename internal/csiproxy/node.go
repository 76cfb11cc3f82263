package csiproxy

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	protobuf "google.golang.org/protobuf/proto"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
)

// The capabilities that the proxy has, whatever the driver has.
var ours = []csi.NodeServiceCapability_RPC_Type{
	csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
	csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
	csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
}

// passed are those of the driver that hold for an encrypted volume as well. Not among
// them: VOLUME_MOUNT_GROUP, since the driver does not mount; kubelet sets the group.
var passed = []csi.NodeServiceCapability_RPC_Type{csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER}

// NodeGetCapabilities implements the service.
func (p *Proxy) NodeGetCapabilities(ctx context.Context, _ *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	theirs, err := p.capabilities(ctx)
	if err != nil {
		return nil, err
	}
	out := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range append(slices.Clone(ours), passed...) {
		if slices.Contains(ours, t) || theirs[t] {
			out.Capabilities = append(out.Capabilities, &csi.NodeServiceCapability{
				Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}},
			})
		}
	}
	return out, nil
}

// capabilities are the driver's. They are asked for each time: a driver may be replaced
// while the proxy runs.
func (p *Proxy) capabilities(ctx context.Context) (map[csi.NodeServiceCapability_RPC_Type]bool, error) {
	a, err := p.driver.NodeGetCapabilities(ctx, &csi.NodeGetCapabilitiesRequest{})
	if err != nil {
		return nil, ofDriver("NodeGetCapabilities", err)
	}
	out := map[csi.NodeServiceCapability_RPC_Type]bool{}
	for _, c := range a.GetCapabilities() {
		out[c.GetRpc().GetType()] = true
	}
	return out, nil
}

// NodeGetInfo implements the service: it is the driver's.
func (p *Proxy) NodeGetInfo(ctx context.Context, r *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return p.driver.NodeGetInfo(ctx, r)
}

// NodeStageVolume implements the service: the driver attaches the raw device, the agent
// opens it, and mounts it where kubelet wants it.
func (p *Proxy) NodeStageVolume(ctx context.Context, r *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if err := p.checkStage(r); err != nil {
		return nil, err
	}
	return do(ctx, &p.work, r.GetVolumeId(), question("stage", r), func(ctx context.Context, o *operation) (*csi.NodeStageVolumeResponse, error) {
		out := &csi.NodeStageVolumeResponse{}
		can, err := p.capabilities(ctx)
		if err != nil {
			return nil, err
		}
		if p.cfg.plain(r.GetVolumeContext()) {
			if exists(p.cfg.private(r.GetVolumeId()).dir) {
				return nil, errBoth
			}
			if can[csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME] {
				return p.driver.NodeStageVolume(ctx, r)
			}
			return out, nil
		}
		if err := p.knows(ctx, r); err != nil {
			return nil, undecided(err)
		}
		o.say("the driver attaches the device")
		device, err := p.attach(ctx, r, can)
		if err != nil {
			return nil, undecided(err)
		}
		return out, undecided(p.open(ctx, r, device, o))
	})
}

// undecided is an error after which something may be attached, mapped or mounted. Of an
// error that is final kubelet concludes that there is nothing to unstage: the device, and
// the volume's lease, would stay on this node for ever.
func undecided(err error) error {
	switch status.Code(err) {
	case codes.OK, codes.Canceled, codes.DeadlineExceeded, codes.Unavailable, codes.ResourceExhausted, codes.Aborted:
		return err
	}
	return status.Error(codes.Unavailable, status.Convert(err).Message())
}

var errNoGrowth = status.Error(codes.FailedPrecondition, "a volume with integrity does not grow: leave allowVolumeExpansion out of its class")

// errBoth is of a volume whose class was changed while it is up. The driver would see a
// device that it may think is empty.
var errBoth = status.Error(codes.FailedPrecondition, "the volume is staged as an encrypted one, and now its class is a plain one")

func (p *Proxy) checkStage(r *csi.NodeStageVolumeRequest) error {
	if err := p.check(r.GetVolumeId(), "staging_target_path", r.GetStagingTargetPath()); err != nil {
		return err
	}
	return p.checkCapability(r.GetVolumeCapability(), r.GetVolumeContext())
}

// check refuses a call that does not say what it is about.
func (p *Proxy) check(volume string, paths ...string) error {
	switch {
	case volume == "":
		return status.Error(codes.InvalidArgument, "volume_id is missing")
	case len(volume) > maxHandle || strings.ContainsRune(volume, 0):
		return status.Errorf(codes.InvalidArgument, "volume_id has more than %d bytes, or a zero byte", maxHandle)
	}
	for i := 0; i < len(paths); i += 2 {
		switch {
		case paths[i+1] == "":
			return status.Errorf(codes.InvalidArgument, "%s is missing", paths[i])
		case !p.cfg.within(paths[i+1]):
			return status.Errorf(codes.InvalidArgument, "%s is not a plain path below %s", paths[i], p.cfg.Kubelet)
		}
	}
	return nil
}

// checkCapability refuses what would lose data.
func (p *Proxy) checkCapability(c *csi.VolumeCapability, context map[string]string) error {
	if c == nil || c.GetMount() == nil && c.GetBlock() == nil {
		return status.Error(codes.InvalidArgument, "volume_capability is missing, or neither mount nor block")
	}
	if p.cfg.plain(context) {
		return nil
	}
	switch c.GetAccessMode().GetMode() {
	case csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER, csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER:
		if c.GetBlock() == nil || !slices.Contains(p.cfg.SharedClasses, context[ClassKey]) {
			return status.Error(codes.InvalidArgument, "several nodes would write one filesystem: use ReadWriteOnce, or a block volume with a cluster filesystem, whose class is one of shared_classes")
		}
	case csi.VolumeCapability_AccessMode_UNKNOWN:
		return status.Error(codes.InvalidArgument, "access_mode is missing")
	}
	return nil
}

func readOnly(c *csi.VolumeCapability) bool {
	m := c.GetAccessMode().GetMode()
	return slices.Contains(mountFlags(c.GetMount().GetMountFlags()), "ro") ||
		m == csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY || m == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
}

// attach has the driver publish the raw device at a path of the proxy's own.
func (p *Proxy) attach(ctx context.Context, r *csi.NodeStageVolumeRequest, can map[csi.NodeServiceCapability_RPC_Type]bool) (string, error) {
	at := p.cfg.private(r.GetVolumeId())
	// Before the driver is asked for anything: the folder says that the volume is not a
	// plain one, and that there is something to undo.
	if err := os.MkdirAll(at.dir, 0o700); err != nil {
		return "", status.Errorf(codes.Internal, "private folder: %v", err)
	}
	block := &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: r.GetVolumeCapability().GetAccessMode(),
	}
	staging := ""
	if can[csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME] {
		if err := os.MkdirAll(at.stage, 0o700); err != nil {
			return "", status.Errorf(codes.Internal, "private folder: %v", err)
		}
		staging = at.stage
		_, err := p.driver.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
			VolumeId: r.GetVolumeId(), PublishContext: r.GetPublishContext(), StagingTargetPath: staging,
			VolumeCapability: block, Secrets: r.GetSecrets(), VolumeContext: r.GetVolumeContext(),
		})
		if err != nil {
			return "", ofDriver("NodeStageVolume of a block device", err)
		}
	}
	n, err := p.mounts.Device(at.device)
	if err != nil {
		return "", ofNode("device of the driver", err)
	}
	used, err := p.used(ctx, r.GetVolumeId(), at)
	if err != nil {
		return "", err
	}
	// Not every driver finds a device that it published before: some would mount another
	// one on top of it. And of what is there only the agent's use of it says that it is
	// this volume's: its number may be another disk's by now.
	if n == 0 || !used {
		if err := p.detach(ctx, r.GetVolumeId(), at); err != nil {
			return "", err
		}
		if err := p.publishRaw(ctx, r, at, staging, block); err != nil {
			return "", err
		}
	}
	switch n, err = p.mounts.Device(at.device); {
	case err != nil:
		return "", ofNode("device of the driver", err)
	case n == 0:
		return "", status.Errorf(codes.Internal, "the driver published no block device at %s: can it publish volumes with volumeMode Block, and does it see this folder, with mountPropagation Bidirectional?", at.device)
	}
	return at.device, nil
}

// used reports whether the agent has the volume, or is about to, on the device at its
// path.
func (p *Proxy) used(ctx context.Context, handle string, at private) (bool, error) {
	v, err := p.status(ctx, handle)
	if err != nil || !busy(v) {
		return false, err
	}
	if v.GetDevice() != at.device {
		return false, status.Errorf(codes.FailedPrecondition, "volume %s is open on %s already: two drivers need two prefixes", v.GetId(), v.GetDevice())
	}
	return true, nil
}

// busy reports whether the agent has something of a volume on this node.
func busy(v *nodev1.Volume) bool {
	switch v.GetState() {
	case "", "absent", "failed":
		return v.GetMapped() != ""
	}
	return true
}

// status is what the agent knows of a volume; nil if nothing.
func (p *Proxy) status(ctx context.Context, handle string) (*nodev1.Volume, error) {
	a, err := p.agent.Status(ctx, &nodev1.StatusRequest{Id: p.cfg.volumeID(handle)})
	if status.Code(err) == codes.NotFound {
		return nil, nil
	}
	if err != nil {
		return nil, ofAgent(err)
	}
	return a.GetVolume(), nil
}

// encrypted reports whether a volume is one of the proxy's here: by its folder, and by
// the agent, since somebody may have removed the folder.
func (p *Proxy) encrypted(ctx context.Context, handle string) (bool, error) {
	if exists(p.cfg.private(handle).dir) {
		return true, nil
	}
	v, err := p.status(ctx, handle)
	return busy(v), err
}

func (p *Proxy) publishRaw(ctx context.Context, r *csi.NodeStageVolumeRequest, at private, staging string, block *csi.VolumeCapability) error {
	_, err := p.driver.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: r.GetVolumeId(), PublishContext: r.GetPublishContext(), StagingTargetPath: staging, TargetPath: at.device,
		VolumeCapability: block, Readonly: readOnly(block), Secrets: r.GetSecrets(), VolumeContext: r.GetVolumeContext(),
	})
	return ofDriver("NodePublishVolume of a block device", err)
}

// knows refuses an agent that would make volumes without the integrity that is asked for,
// for good, or passes over what they are clones of.
func (p *Proxy) knows(ctx context.Context, r *csi.NodeStageVolumeRequest) error {
	needs := map[string]bool{nodev1.FeatureIntegrity: p.cfg.Integrity != "", nodev1.FeatureSource: r.GetVolumeContext()[SourceKey] != ""}
	maps.DeleteFunc(needs, func(_ string, needed bool) bool { return !needed })
	if len(needs) == 0 {
		return nil
	}
	var header metadata.MD
	_, err := p.agent.Status(ctx, &nodev1.StatusRequest{Id: p.cfg.volumeID(r.GetVolumeId())}, grpc.Header(&header))
	if err != nil && status.Code(err) != codes.NotFound {
		return ofAgent(err)
	}
	for feature := range needs {
		if !nodev1.Has(header, feature) {
			return status.Errorf(codes.Unavailable, "the agent is older than this program, and does not know of %s: upgrade it", feature)
		}
	}
	return nil
}

// open has the agent open the device.
func (p *Proxy) open(ctx context.Context, r *csi.NodeStageVolumeRequest, device string, o *operation) error {
	id := p.cfg.volumeID(r.GetVolumeId())
	c := r.GetVolumeCapability()
	want := &nodev1.OpenRequest{
		Id: id, Device: device, Name: mappingName(id), ReadOnly: readOnly(c), Discards: p.cfg.Discards, Integrity: p.cfg.Integrity, Format: !readOnly(c),
	}
	if m := c.GetMount(); m != nil {
		want.Filesystem, want.MountPoint, want.Options = m.GetFsType(), r.GetStagingTargetPath(), mountFlags(m.GetMountFlags())
		if want.Filesystem == "" {
			want.Filesystem = p.cfg.Filesystem
		}
	} else {
		want.Filesystem = "none"
	}
	if source := r.GetVolumeContext()[SourceKey]; source != "" {
		want.Source = p.cfg.volumeID(source)
	}
	o.say("the agent opens the volume")
	ctx, cancel := context.WithCancel(ctx) // the answer is not read to its end
	defer cancel()
	stream, err := p.agent.OpenProgress(ctx, want)
	if err != nil {
		return ofAgent(err)
	}
	for {
		e, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return status.Error(codes.Internal, "the agent ended in the middle of its answer")
		case status.Code(err) == codes.NotFound && want.GetSource() != "" && !want.GetFormat():
			return status.Error(codes.FailedPrecondition, "a read-only claim cannot be the first of a clone: stage it once for writing, which makes it a volume")
		case err != nil:
			return ofAgent(err)
		case e.GetVolume() != nil:
			p.log.Info("staged", "volume", id, "mapped", e.GetVolume().GetMapped())
			return nil
		}
		o.say("the agent opens the volume; last step: " + e.GetStep())
	}
}

// mountFlags splits what Kubernetes may write as one: "a,b".
func mountFlags(flags []string) []string {
	var out []string
	for _, f := range flags {
		for _, one := range splitOptions(f) {
			if one != "" {
				out = append(out, one)
			}
		}
	}
	return out
}

// splitOptions cuts at commas that are not within quotes: a context of SELinux has some.
func splitOptions(s string) []string {
	quoted := false
	return strings.FieldsFunc(s, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return r == ',' && !quoted
	})
}

// NodeUnstageVolume implements the service.
func (p *Proxy) NodeUnstageVolume(ctx context.Context, r *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	if err := p.check(r.GetVolumeId(), "staging_target_path", r.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	return do(ctx, &p.work, r.GetVolumeId(), question("unstage", r), func(ctx context.Context, o *operation) (*csi.NodeUnstageVolumeResponse, error) {
		at := p.cfg.private(r.GetVolumeId())
		if ours, err := p.encrypted(ctx, r.GetVolumeId()); err != nil {
			return nil, err
		} else if !ours {
			// A plain volume, or one that was unstaged before.
			can, err := p.capabilities(ctx)
			if err == nil && can[csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME] {
				return p.driver.NodeUnstageVolume(ctx, r)
			}
			return &csi.NodeUnstageVolumeResponse{}, err
		}
		o.say("the agent closes the volume")
		if _, err := p.used(ctx, r.GetVolumeId(), at); err != nil {
			return nil, err
		}
		_, err := p.agent.Close(ctx, &nodev1.CloseRequest{Id: p.cfg.volumeID(r.GetVolumeId())})
		if err != nil && status.Code(err) != codes.NotFound { // not found: it never came to be open
			return nil, ofAgent(err)
		}
		if err := p.unused(r.GetVolumeId(), at); err != nil {
			return nil, err
		}
		o.say("the driver detaches the device")
		if err := p.detach(ctx, r.GetVolumeId(), at); err != nil {
			return nil, err
		}
		if err := p.unstageRaw(ctx, r.GetVolumeId(), at); err != nil {
			return nil, err
		}
		if err := p.mounts.Remove(at.stage); err != nil { // some drivers leave files there
			return nil, ofNode("private folder", err)
		}
		if err := os.Remove(at.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, ofNode("private folder", err)
		}
		return &csi.NodeUnstageVolumeResponse{}, nil
	})
}

// unused refuses to take the device away below the volume's own mapping, where the agent
// does not remember it. Another mapping on it is not this volume's: the driver attached
// another one's device.
func (p *Proxy) unused(volume string, at private) error {
	n, err := p.mounts.Device(at.device)
	if err != nil {
		return ofNode("device of the driver", err)
	}
	id := p.cfg.volumeID(volume)
	name := cmp.Or(mappingName(id), id)
	if n != 0 && slices.Contains(p.mounts.Holders(n), name) {
		return status.Errorf(codes.FailedPrecondition, "the mapping %s lies on the device, and the agent does not know it: dmsetup remove %s", name, name)
	}
	return nil
}

// detach undoes publishRaw, also where it was done twice.
func (p *Proxy) detach(ctx context.Context, volume string, at private) error {
	if !exists(at.device) {
		return nil
	}
	_, err := p.driver.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: volume, TargetPath: at.device})
	if err != nil && status.Code(err) != codes.NotFound { // not found: the volume was deleted
		return ofDriver("NodeUnpublishVolume", err)
	}
	if err := p.mounts.Clear(at.device); err != nil {
		return ofNode("device of the driver", err)
	}
	return nil
}

func (p *Proxy) unstageRaw(ctx context.Context, volume string, at private) error {
	if !exists(at.stage) {
		return nil
	}
	_, err := p.driver.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: volume, StagingTargetPath: at.stage})
	if err != nil && status.Code(err) != codes.NotFound {
		return ofDriver("NodeUnstageVolume", err)
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// question identifies what is asked: the same again is the same question. Secrets are in
// it as a digest alone.
func question(call string, r protobuf.Message) string {
	data, err := protobuf.MarshalOptions{Deterministic: true}.Marshal(r)
	if err != nil {
		data = fmt.Append(nil, r)
	}
	return fmt.Sprintf("%s %x", call, sha256.Sum256(data))
}

// ofDriver says who refused. The code stays.
func ofDriver(call string, err error) error {
	if err == nil {
		return nil
	}
	return status.Errorf(status.Code(err), "driver: %s: %s", call, status.Convert(err).Message())
}
