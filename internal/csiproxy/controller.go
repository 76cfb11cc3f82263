package csiproxy

import (
	"maps"
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
			if !plain {
				c.larger(r.GetCapacityRange())
				asBlock(r.GetVolumeCapabilities())
			}
		},
		func(c *Config, r *csi.CreateVolumeRequest, a *csi.CreateVolumeResponse) {
			class := r.GetParameters()[ClassKey]
			if !slices.Contains(c.PlainClasses, class) {
				c.smallerVolume(a.GetVolume())
			}
			if class != "" && a.GetVolume() != nil {
				context := maps.Clone(a.GetVolume().GetVolumeContext())
				if context == nil {
					context = map[string]string{}
				}
				context[ClassKey] = class
				a.GetVolume().VolumeContext = context
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
		func(c *Config, _ *csi.CreateSnapshotRequest, a *csi.CreateSnapshotResponse) {
			c.smallerSnapshot(a.GetSnapshot())
		}),
	csi.Controller_ListSnapshots_FullMethodName: rewriting(nil,
		func(c *Config, _ *csi.ListSnapshotsRequest, a *csi.ListSnapshotsResponse) {
			for _, e := range a.GetEntries() {
				c.smallerSnapshot(e.GetSnapshot())
			}
		}),
	csi.Controller_GetSnapshot_FullMethodName: rewriting(nil,
		func(c *Config, _ *csi.GetSnapshotRequest, a *csi.GetSnapshotResponse) {
			c.smallerSnapshot(a.GetSnapshot())
		}),
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

func (c *Config) smallerSnapshot(s *csi.Snapshot) {
	if s != nil {
		c.smaller(&s.SizeBytes)
	}
}

// asBlock has the driver attach raw devices, with the same access.
func asBlock(all []*csi.VolumeCapability) {
	for _, c := range all {
		if c.GetMount() != nil {
			c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
		}
	}
}
