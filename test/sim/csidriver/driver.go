// Package csidriver is a CSI driver for tests. It attaches what its test says, and can
// be as careless as drivers of the field are.
package csidriver

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Driver is a driver with the three services. Its fields are set before it serves, or
// under [Driver.Set].
type Driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedNodeServer

	Name string
	Can  []csi.NodeServiceCapability_RPC_Type
	// Stage and Unstage come before and after. Publish attaches a volume at a path, and
	// Unpublish takes it away. Nil does nothing.
	Stage     func(*csi.NodeStageVolumeRequest) error
	Unstage   func(*csi.NodeUnstageVolumeRequest) error
	Publish   func(*csi.NodePublishVolumeRequest) error
	Unpublish func(*csi.NodeUnpublishVolumeRequest) error
	Expand    func(*csi.NodeExpandVolumeRequest) error
	// Fail makes calls of these names fail.
	Fail map[string]error

	mu    sync.Mutex
	calls []proto.Message
}

// Set changes a driver that serves.
func (d *Driver) Set(f func(*Driver)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f(d)
}

// Calls returns what was asked since the last time.
func (d *Driver) Calls() []proto.Message {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := d.calls
	d.calls = nil
	return out
}

// Server returns a server of the driver.
func (d *Driver) Server() *grpc.Server {
	s := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, r any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		d.mu.Lock()
		m := r.(proto.Message)
		d.calls = append(d.calls, m)
		err := d.Fail[string(m.ProtoReflect().Descriptor().Name())]
		d.mu.Unlock()
		if err != nil {
			return nil, err
		}
		return h(ctx, r)
	}))
	csi.RegisterIdentityServer(s, d)
	csi.RegisterControllerServer(s, d)
	csi.RegisterNodeServer(s, d)
	return s
}

// GetPluginInfo implements the identity service.
func (d *Driver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: d.Name, VendorVersion: "1"}, nil
}

// NodeGetCapabilities implements the node's service.
func (d *Driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range d.Can {
		out.Capabilities = append(out.Capabilities, &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}}})
	}
	return out, nil
}

func (d *Driver) can(t csi.NodeServiceCapability_RPC_Type) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Contains(d.Can, t)
}

// NodeGetInfo implements the node's service.
func (d *Driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: "node-1", AccessibleTopology: &csi.Topology{Segments: map[string]string{"zone": "z"}}}, nil
}

// NodeStageVolume implements the node's service.
func (d *Driver) NodeStageVolume(_ context.Context, r *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if !d.can(csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME) {
		return nil, status.Error(codes.Unimplemented, "this driver does not stage")
	}
	return &csi.NodeStageVolumeResponse{}, ask(d.Stage, r)
}

// NodeUnstageVolume implements the node's service.
func (d *Driver) NodeUnstageVolume(_ context.Context, r *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	if !d.can(csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME) {
		return nil, status.Error(codes.Unimplemented, "this driver does not stage")
	}
	return &csi.NodeUnstageVolumeResponse{}, ask(d.Unstage, r)
}

// NodePublishVolume implements the node's service.
func (d *Driver) NodePublishVolume(_ context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if d.can(csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME) && r.GetStagingTargetPath() == "" {
		return nil, status.Error(codes.FailedPrecondition, "it was not staged")
	}
	return &csi.NodePublishVolumeResponse{}, ask(d.Publish, r)
}

// NodeUnpublishVolume implements the node's service.
func (d *Driver) NodeUnpublishVolume(_ context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	return &csi.NodeUnpublishVolumeResponse{}, ask(d.Unpublish, r)
}

// NodeExpandVolume implements the node's service.
func (d *Driver) NodeExpandVolume(_ context.Context, r *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	return &csi.NodeExpandVolumeResponse{}, ask(d.Expand, r)
}

// CreateVolume implements the controller's service: a volume is as large as was asked
// for.
func (d *Driver) CreateVolume(_ context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{
		VolumeId: "handle-of-" + r.GetName(), CapacityBytes: r.GetCapacityRange().GetRequiredBytes(), VolumeContext: map[string]string{"disk": r.GetName()},
	}}, nil
}

// ControllerExpandVolume implements the controller's service.
func (d *Driver) ControllerExpandVolume(_ context.Context, r *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: r.GetCapacityRange().GetRequiredBytes()}, nil
}

// CreateSnapshot implements the controller's service.
func (d *Driver) CreateSnapshot(_ context.Context, r *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	return &csi.CreateSnapshotResponse{Snapshot: &csi.Snapshot{SnapshotId: r.GetName(), SourceVolumeId: r.GetSourceVolumeId(), SizeBytes: 1 << 30}}, nil
}

// DeleteSnapshot implements the controller's service.
func (d *Driver) DeleteSnapshot(context.Context, *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	return &csi.DeleteSnapshotResponse{}, nil
}

// DeleteVolume implements the controller's service.
func (d *Driver) DeleteVolume(context.Context, *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	return &csi.DeleteVolumeResponse{}, nil
}

func ask[R any](f func(R) error, r R) error {
	if f == nil {
		return nil
	}
	if err := f(r); err != nil {
		return status.Error(codes.Internal, fmt.Sprint(err))
	}
	return nil
}
