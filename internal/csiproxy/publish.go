package csiproxy

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/luks"
)

// NodePublishVolume implements the service: it shows a pod what was staged.
func (p *Proxy) NodePublishVolume(ctx context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if err := p.check(r.GetVolumeId(), "target_path", r.GetTargetPath()); err != nil {
		return nil, err
	}
	if err := p.checkCapability(r.GetVolumeCapability(), r.GetVolumeContext()); err != nil {
		return nil, err
	}
	plain := p.cfg.plain(r.GetVolumeContext())
	if !plain && r.GetStagingTargetPath() == "" {
		// An ephemeral volume of a pod has no stage, and no grant of its own either.
		return nil, status.Error(codes.FailedPrecondition, "staging_target_path is missing: only volumes of claims are encrypted; an ephemeral volume needs a class of plain_classes")
	}
	return do(ctx, &p.work, r.GetVolumeId(), question("publish", r), func(ctx context.Context, o *operation) (*csi.NodePublishVolumeResponse, error) {
		if plain {
			if exists(p.cfg.private(r.GetVolumeId()).dir) {
				return nil, errBoth
			}
			return p.driver.NodePublishVolume(ctx, r)
		}
		v, err := p.staged(ctx, r.GetVolumeId())
		if err != nil {
			return nil, err
		}
		o.say("mounting it for the pod")
		if err := p.show(r, v); err != nil {
			return nil, ofNode("publish", err)
		}
		return &csi.NodePublishVolumeResponse{}, nil
	})
}

// staged is the volume, if it is open.
func (p *Proxy) staged(ctx context.Context, handle string) (*nodev1.Volume, error) {
	v, err := p.status(ctx, handle)
	if err != nil {
		return nil, err
	}
	if s := v.GetState(); s != "open" && s != "mounted" {
		return nil, status.Errorf(codes.FailedPrecondition, "volume %.128q is not staged: it is %s", handle, orUnknown(s))
	}
	return v, nil
}

func orUnknown(state string) string {
	if state == "" {
		return "unknown to the agent"
	}
	return state
}

func (p *Proxy) show(r *csi.NodePublishVolumeRequest, v *nodev1.Volume) error {
	device := p.mounts.Number(v.GetMapped())
	if device == 0 {
		return status.Errorf(codes.FailedPrecondition, "there is no device %s: does the proxy see the /dev of its node?", v.GetMapped())
	}
	if r.GetVolumeCapability().GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER {
		if err := p.alone(device, v.GetMountPoint(), r.GetTargetPath()); err != nil {
			return err
		}
	}
	if m := r.GetVolumeCapability().GetMount(); m != nil {
		options := mountFlags(m.GetMountFlags())
		if r.GetReadonly() || readOnly(r.GetVolumeCapability()) {
			options = append(options, "ro")
		}
		return p.mounts.BindFolder(r.GetStagingTargetPath(), device, r.GetTargetPath(), options)
	}
	if v.GetMountPoint() != "" {
		return status.Error(codes.FailedPrecondition, "the volume is mounted as a filesystem, and cannot be a block device as well")
	}
	if r.GetReadonly() && !v.GetReadOnly() {
		// The node of a device can be written through a mount that is read-only.
		return status.Error(codes.FailedPrecondition, "a block device that was staged for writing cannot be published read-only: use the access mode ReadOnlyMany")
	}
	return p.mounts.BindDevice(v.GetMapped(), device, r.GetTargetPath())
}

// alone refuses a second pod to a volume that one pod may have. The driver cannot: it sees
// one device at one place.
func (p *Proxy) alone(device uint64, staged, target string) error {
	points, err := p.mounts.Points(device)
	if err != nil {
		return err
	}
	if real, err := filepath.EvalSymlinks(filepath.Dir(target)); err == nil {
		target = filepath.Join(real, filepath.Base(target))
	}
	for _, at := range points {
		if at != staged && at != target {
			return status.Errorf(codes.FailedPrecondition, "the volume is for one pod, and one has it already: %s", at)
		}
	}
	return nil
}

// NodeUnpublishVolume implements the service.
func (p *Proxy) NodeUnpublishVolume(ctx context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if err := p.check(r.GetVolumeId(), "target_path", r.GetTargetPath()); err != nil {
		return nil, err
	}
	return do(ctx, &p.work, r.GetVolumeId(), question("unpublish", r), func(ctx context.Context, _ *operation) (*csi.NodeUnpublishVolumeResponse, error) {
		ours, err := p.encrypted(ctx, r.GetVolumeId())
		if err != nil {
			return nil, err
		}
		if !ours {
			// Not found: an encrypted volume that was deleted, or unstaged before.
			if a, err := p.driver.NodeUnpublishVolume(ctx, r); err != nil && status.Code(err) != codes.NotFound {
				return a, err
			}
		}
		// Also where the driver did it: of an encrypted volume that was unstaged before it
		// was unpublished, the driver knows nothing.
		if err := p.mounts.Clear(r.GetTargetPath()); err != nil {
			return nil, ofNode("unpublish", err)
		}
		return &csi.NodeUnpublishVolumeResponse{}, nil
	})
}

// NodeGetVolumeStats implements the service.
func (p *Proxy) NodeGetVolumeStats(ctx context.Context, r *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	if err := p.checkPath(r.GetVolumeId(), r.GetVolumePath()); err != nil {
		return nil, err
	}
	if ours, err := p.encrypted(ctx, r.GetVolumeId()); err != nil {
		return nil, err
	} else if !ours {
		return p.driver.NodeGetVolumeStats(ctx, r)
	}
	if !p.cfg.within(r.GetVolumePath()) {
		return nil, status.Errorf(codes.NotFound, "nothing is published at %.200q", r.GetVolumePath())
	}
	var st unix.Stat_t
	if err := unix.Lstat(r.GetVolumePath(), &st); errors.Is(err, fs.ErrNotExist) {
		return nil, status.Errorf(codes.NotFound, "nothing is published at %s", r.GetVolumePath())
	} else if err != nil {
		return nil, status.Errorf(codes.Internal, "volume_path: %v", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		v, err := p.staged(ctx, r.GetVolumeId())
		if err != nil {
			return nil, err
		}
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: int64(v.GetBytes())}}}, nil
	}
	var f unix.Statfs_t
	if err := unix.Statfs(r.GetVolumePath(), &f); err != nil {
		return nil, status.Errorf(codes.Internal, "volume_path: %v", err)
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: usage(&f)}, nil
}

// checkPath is check for calls about what is published: a path at which nothing can be is
// answered by those who know the volume.
func (p *Proxy) checkPath(volume, path string) error {
	if path == "" {
		return p.check(volume, "volume_path", path)
	}
	return p.check(volume)
}

func usage(f *unix.Statfs_t) []*csi.VolumeUsage {
	size := int64(f.Frsize)
	if size == 0 {
		size = f.Bsize
	}
	out := []*csi.VolumeUsage{{
		Unit: csi.VolumeUsage_BYTES, Total: int64(f.Blocks) * size, Available: int64(f.Bavail) * size, Used: int64(f.Blocks-f.Bfree) * size,
	}}
	if f.Files > 0 { // btrfs does not count
		out = append(out, &csi.VolumeUsage{
			Unit: csi.VolumeUsage_INODES, Total: int64(f.Files), Available: int64(f.Ffree), Used: int64(f.Files - f.Ffree),
		})
	}
	return out
}

// NodeExpandVolume implements the service: the device grows, then the mapping, then the
// filesystem.
func (p *Proxy) NodeExpandVolume(ctx context.Context, r *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	if err := p.checkPath(r.GetVolumeId(), r.GetVolumePath()); err != nil {
		return nil, err
	}
	at := p.cfg.private(r.GetVolumeId())
	return do(ctx, &p.work, r.GetVolumeId(), question("expand", r), func(ctx context.Context, o *operation) (*csi.NodeExpandVolumeResponse, error) {
		if ours, err := p.encrypted(ctx, r.GetVolumeId()); err != nil {
			return nil, undecided(err)
		} else if !ours {
			return p.driver.NodeExpandVolume(ctx, r)
		}
		if !p.cfg.within(r.GetVolumePath()) || !exists(r.GetVolumePath()) {
			return nil, status.Errorf(codes.NotFound, "nothing is published at %s", r.GetVolumePath())
		}
		if p.cfg.Integrity != "" {
			return nil, errNoGrowth
		}
		// Kubelet gives an expansion up for good where the answer is final.
		if _, err := p.staged(ctx, r.GetVolumeId()); err != nil {
			return nil, undecided(err)
		}
		o.say("the driver grows the device")
		if err := p.expandRaw(ctx, r, at); err != nil {
			return nil, undecided(err)
		}
		o.say("the agent grows the volume")
		a, err := p.agent.Resize(ctx, &nodev1.ResizeRequest{Id: p.cfg.volumeID(r.GetVolumeId())})
		if err != nil {
			return nil, undecided(ofAgent(err))
		}
		size := int64(a.GetVolume().GetBytes())
		// Without a proxy before the controller nobody asked for the header's part.
		if wanted := r.GetCapacityRange().GetRequiredBytes(); luks.Need(size, luks.Integrity(p.cfg.Integrity)) < wanted {
			return nil, status.Errorf(codes.Unavailable, "the volume has %d bytes now, fewer than the %d that were asked for: the device is not larger yet", size, wanted)
		}
		return &csi.NodeExpandVolumeResponse{CapacityBytes: size}, nil
	})
}

func (p *Proxy) expandRaw(ctx context.Context, r *csi.NodeExpandVolumeRequest, at private) error {
	can, err := p.capabilities(ctx)
	if err != nil || !can[csi.NodeServiceCapability_RPC_EXPAND_VOLUME] {
		return err
	}
	staging := ""
	if can[csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME] {
		staging = at.stage
	}
	block := &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: r.GetVolumeCapability().GetAccessMode(),
	}
	_, err = p.driver.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
		// No size: as large as the controller made it. Whether that counted the header in is
		// not known here.
		VolumeId: r.GetVolumeId(), VolumePath: at.device, StagingTargetPath: staging, VolumeCapability: block, Secrets: r.GetSecrets(),
	})
	return ofDriver("NodeExpandVolume", err)
}
