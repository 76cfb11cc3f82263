package csiproxy

import (
	"maps"
	"net/url"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	protobuf "google.golang.org/protobuf/proto"

	"github.com/keyagent/keyagent/luks"
)

// passes reports whether calls of a method may reach the driver unseen.
func passes(method string) bool {
	return strings.HasPrefix(method, "/csi.v1.") && !strings.HasPrefix(method, "/csi.v1.Node/")
}

// rewrites are the calls of the controller whose sizes and capabilities change: a volume
// is larger by its header than what was asked for, and it is raw block for the driver.
var rewrites = map[string]rewrite{
	csi.Controller_CreateVolume_FullMethodName: rewriting(
		func(c *Config, r *csi.CreateVolumeRequest) {
			plain := slices.Contains(c.PlainClasses, r.GetParameters()[ClassKey])
			// A driver may refuse a parameter that it does not know.
			delete(r.Parameters, ClassKey)
			if s := r.GetVolumeContentSource().GetSnapshot(); s != nil {
				s.SnapshotId, _ = ofSource(s.SnapshotId)
			}
			if !plain {
				c.larger(r.GetCapacityRange())
				asBlock(r.GetVolumeCapabilities())
			}
		},
		func(c *Config, r *csi.CreateVolumeRequest, a *csi.CreateVolumeResponse) {
			v := a.GetVolume()
			if v == nil {
				return
			}
			if v.GetContentSource().GetSnapshot() != nil && r.GetVolumeContentSource().GetSnapshot() != nil {
				v.ContentSource = r.GetVolumeContentSource()
			}
			class := r.GetParameters()[ClassKey]
			if class != "" {
				addTo(v, ClassKey, class)
			}
			if slices.Contains(c.PlainClasses, class) {
				return
			}
			c.smallerVolume(v)
			// The node has to know whose header and key the new disk has.
			source := r.GetVolumeContentSource().GetVolume().GetVolumeId()
			if s := r.GetVolumeContentSource().GetSnapshot(); s != nil {
				_, source = ofSource(s.GetSnapshotId())
			}
			if source != "" {
				addTo(v, SourceKey, source)
			}
		}),
	csi.Controller_ControllerPublishVolume_FullMethodName: rewriting[*csi.ControllerPublishVolumeRequest, *csi.ControllerPublishVolumeResponse](
		func(c *Config, r *csi.ControllerPublishVolumeRequest) {
			if !c.plain(r.GetVolumeContext()) {
				asBlock([]*csi.VolumeCapability{r.GetVolumeCapability()})
			}
		}, nil),
	csi.Controller_ValidateVolumeCapabilities_FullMethodName: rewriting(
		func(c *Config, r *csi.ValidateVolumeCapabilitiesRequest) {
			if !c.plain(r.GetVolumeContext()) {
				asBlock(r.GetVolumeCapabilities())
			}
		},
		func(c *Config, r *csi.ValidateVolumeCapabilitiesRequest, a *csi.ValidateVolumeCapabilitiesResponse) {
			if a.GetConfirmed() != nil && len(a.GetConfirmed().GetVolumeCapabilities()) > 0 {
				a.Confirmed.VolumeCapabilities = r.GetVolumeCapabilities()
			}
		}),
	csi.Controller_ControllerExpandVolume_FullMethodName: rewriting(
		func(c *Config, r *csi.ControllerExpandVolumeRequest) {
			c.larger(r.GetCapacityRange())
			if r.GetVolumeCapability() != nil {
				asBlock([]*csi.VolumeCapability{r.GetVolumeCapability()})
			}
		},
		func(c *Config, _ *csi.ControllerExpandVolumeRequest, a *csi.ControllerExpandVolumeResponse) {
			c.smaller(&a.CapacityBytes)
			// Whatever the driver thinks: the mapping and its filesystem have to grow.
			a.NodeExpansionRequired = true
		}).unless(func(c *Config) error {
		if c.Integrity != "" && len(c.PlainClasses) == 0 {
			return errNoGrowth // before the storage grows for nothing
		}
		return nil
	}),
	csi.Controller_ListVolumes_FullMethodName: rewriting(nil,
		func(c *Config, _ *csi.ListVolumesRequest, a *csi.ListVolumesResponse) {
			for _, e := range a.GetEntries() {
				c.smallerVolume(e.GetVolume())
			}
		}),
	csi.Controller_ControllerGetVolume_FullMethodName: rewriting(nil,
		func(c *Config, _ *csi.ControllerGetVolumeRequest, a *csi.ControllerGetVolumeResponse) {
			c.smallerVolume(a.GetVolume())
		}),
	// What is restored from a snapshot must be allowed to be as large as its source was.
	csi.Controller_CreateSnapshot_FullMethodName: rewriting(nil,
		func(c *Config, r *csi.CreateSnapshotRequest, a *csi.CreateSnapshotResponse) {
			if a.GetSnapshot() != nil {
				// The name by which it was asked for is the one that nodes know.
				a.GetSnapshot().SourceVolumeId = r.GetSourceVolumeId()
			}
			c.snapshots(a.GetSnapshot())
		}),
	csi.Controller_DeleteSnapshot_FullMethodName: rewriting[*csi.DeleteSnapshotRequest, *csi.DeleteSnapshotResponse](
		func(_ *Config, r *csi.DeleteSnapshotRequest) { r.SnapshotId, _ = ofSource(r.SnapshotId) }, nil),
	csi.Controller_ListSnapshots_FullMethodName: rewriting(
		func(_ *Config, r *csi.ListSnapshotsRequest) { r.SnapshotId, _ = ofSource(r.SnapshotId) },
		func(c *Config, _ *csi.ListSnapshotsRequest, a *csi.ListSnapshotsResponse) {
			for _, e := range a.GetEntries() {
				c.snapshots(e.GetSnapshot())
			}
		}),
	csi.Controller_GetSnapshot_FullMethodName: rewriting(
		func(_ *Config, r *csi.GetSnapshotRequest) { r.SnapshotId, _ = ofSource(r.SnapshotId) },
		func(c *Config, _ *csi.GetSnapshotRequest, a *csi.GetSnapshotResponse) {
			c.snapshots(a.GetSnapshot())
		}),
	csi.GroupController_CreateVolumeGroupSnapshot_FullMethodName: rewriting(nil,
		func(c *Config, _ *csi.CreateVolumeGroupSnapshotRequest, a *csi.CreateVolumeGroupSnapshotResponse) {
			c.snapshots(a.GetGroupSnapshot().GetSnapshots()...)
		}),
	csi.GroupController_GetVolumeGroupSnapshot_FullMethodName: rewriting(
		func(_ *Config, r *csi.GetVolumeGroupSnapshotRequest) { withoutSources(r.SnapshotIds) },
		func(c *Config, _ *csi.GetVolumeGroupSnapshotRequest, a *csi.GetVolumeGroupSnapshotResponse) {
			c.snapshots(a.GetGroupSnapshot().GetSnapshots()...)
		}),
	csi.GroupController_DeleteVolumeGroupSnapshot_FullMethodName: rewriting[*csi.DeleteVolumeGroupSnapshotRequest, *csi.DeleteVolumeGroupSnapshotResponse](
		func(_ *Config, r *csi.DeleteVolumeGroupSnapshotRequest) { withoutSources(r.SnapshotIds) }, nil),
	csi.SnapshotMetadata_GetMetadataAllocated_FullMethodName: rewriting[*csi.GetMetadataAllocatedRequest, *csi.GetMetadataAllocatedResponse](
		func(_ *Config, r *csi.GetMetadataAllocatedRequest) { r.SnapshotId, _ = ofSource(r.SnapshotId) }, nil),
	csi.SnapshotMetadata_GetMetadataDelta_FullMethodName: rewriting[*csi.GetMetadataDeltaRequest, *csi.GetMetadataDeltaResponse](
		func(_ *Config, r *csi.GetMetadataDeltaRequest) {
			r.BaseSnapshotId, _ = ofSource(r.BaseSnapshotId)
			r.TargetSnapshotId, _ = ofSource(r.TargetSnapshotId)
		}, nil),
	csi.Controller_GetCapacity_FullMethodName: rewriting(
		func(_ *Config, r *csi.GetCapacityRequest) {
			delete(r.Parameters, ClassKey)
			asBlock(r.GetVolumeCapabilities())
		},
		func(c *Config, _ *csi.GetCapacityRequest, a *csi.GetCapacityResponse) {
			c.smaller(&a.AvailableCapacity)
			if a.GetMaximumVolumeSize() != nil {
				c.smaller(&a.MaximumVolumeSize.Value)
			}
			if a.GetMinimumVolumeSize() != nil {
				c.smaller(&a.MinimumVolumeSize.Value)
			}
		}),
}

// unless refuses the calls of a row for some configurations.
func (r rewrite) unless(refuse func(*Config) error) rewrite {
	r.refuse = refuse
	return r
}

// rewriting makes a row of types.
func rewriting[Q, A protobuf.Message](request func(*Config, Q), answer func(*Config, Q, A)) rewrite {
	var q Q
	var a A
	r := rewrite{
		newRequest: func() protobuf.Message { return q.ProtoReflect().New().Interface() },
		newAnswer:  func() protobuf.Message { return a.ProtoReflect().New().Interface() },
		request:    func(*Config, protobuf.Message) {},
	}
	if request != nil {
		r.request = func(c *Config, m protobuf.Message) { request(c, m.(Q)) }
	}
	if answer != nil {
		r.answer = func(c *Config, req, m protobuf.Message) { answer(c, req.(Q), m.(A)) }
	}
	return r
}

// plain reports whether the volume is one that the configuration leaves without
// encryption.
func (c *Config) plain(context map[string]string) bool {
	class, ok := context[ClassKey]
	return ok && slices.Contains(c.PlainClasses, class)
}

// larger adds the header, and the tags, to what is asked for.
func (c *Config) larger(r *csi.CapacityRange) {
	if r == nil {
		return
	}
	for _, n := range []*int64{&r.RequiredBytes, &r.LimitBytes} {
		if *n > 0 && *n <= maxBytes {
			*n = luks.Need(*n, luks.Integrity(c.Integrity))
		}
	}
}

const maxBytes = 1 << 62

// smaller takes them off a size. Zero is a size that is not known.
func (c *Config) smaller(n *int64) {
	if *n > 0 {
		*n = luks.Room(*n, luks.Integrity(c.Integrity))
	}
}

func (c *Config) smallerVolume(v *csi.Volume) {
	if v != nil {
		c.smaller(&v.CapacityBytes)
	}
}

// snapshots rewrites what the driver says of them. Each name gets the source's appended:
// the node that restores the snapshot needs it, and a driver may not remember.
func (c *Config) snapshots(all ...*csi.Snapshot) {
	for _, s := range all {
		if s == nil {
			continue
		}
		c.smaller(&s.SizeBytes)
		if s.GetSourceVolumeId() != "" {
			s.SnapshotId += sourceMark + url.QueryEscape(s.GetSourceVolumeId())
		}
	}
}

// sourceMark stands between the driver's name of a snapshot and that of its source.
const sourceMark = "@keyagent:"

// ofSource splits what snapshots made. A name from elsewhere has no source.
func ofSource(id string) (snapshot, source string) {
	at := strings.LastIndex(id, sourceMark)
	if at < 0 {
		return id, ""
	}
	source, err := url.QueryUnescape(id[at+len(sourceMark):])
	if err != nil || source == "" {
		return id, ""
	}
	return id[:at], source
}

func withoutSources(ids []string) {
	for i := range ids {
		ids[i], _ = ofSource(ids[i])
	}
}

// addTo puts an attribute into a volume that was just created.
func addTo(v *csi.Volume, key, value string) {
	attributes := maps.Clone(v.GetVolumeContext())
	if attributes == nil {
		attributes = map[string]string{}
	}
	attributes[key] = value
	v.VolumeContext = attributes
}

// asBlock has the driver attach raw devices, with the same access.
func asBlock(all []*csi.VolumeCapability) {
	for _, c := range all {
		if c.GetMount() != nil {
			c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
		}
	}
}
