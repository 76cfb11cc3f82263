package keyservice

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/volume"
)

// Who may open a volume, or create it, may hold its lease.
var toHold = []policy.Operation{policy.Open, policy.Format}

// RenewLease implements the service. A renewal is in the audit log only if it is
// refused, or the lease has another holder since.
func (s *Service) RenewLease(ctx context.Context, req *keyservicev1.RenewLeaseRequest) (*keyservicev1.RenewLeaseResponse, error) {
	var resp *keyservicev1.RenewLeaseResponse
	if req.GetVerdict() {
		// So that a refusal is told from the one of a release that does not know the question.
		if err := grpc.SetHeader(ctx, metadata.Pairs(keyservicev1.VerdictHeader, "1")); err != nil {
			return nil, err
		}
	}
	wants := ask{event: "renew-lease", volume: req.GetVolumeId(), ops: toHold, readOnly: req.GetVerdict() && req.GetReadOnly(), offline: req.GetOpenedOffline()}
	err := s.decide(ctx, wants, func(d *decision) error {
		c := d.caller.callerFor(req.GetNode(), req.GetLeaseId(), keyservicev1.Protocol)
		d.entry.Lease, d.entry.Holder = hexed(req.GetLeaseId()), c.Holder.String()
		rec, err := s.volumes.Get(ctx, req.GetVolumeId())
		if err != nil {
			return err
		}
		if err := d.mustOwn(rec); err != nil {
			return err
		}
		if req.GetVerdict() {
			if rec.State == volume.Retired {
				return fmt.Errorf("%w: %q", volume.ErrRetired, rec.VolumeID)
			}
			resp = &keyservicev1.RenewLeaseResponse{CorrelationId: d.entry.CorrelationID}
			return nil
		}
		rec, before, err := s.volumes.Renew(ctx, req.GetVolumeId(), c, d.terms())
		if err != nil {
			return err
		}
		resp = &keyservicev1.RenewLeaseResponse{Lease: leaseOf(rec), CorrelationId: d.entry.CorrelationID, Rotate: rec.Lease != nil && rec.Wants(s.now())}
		if rec.Lease == nil || rec.Lease.Holder == before {
			return nil
		}
		d.note(rec)
		return s.audit.Append(*d.entry)
	})
	return answered(resp, err)
}

// ReleaseLease implements the service.
func (s *Service) ReleaseLease(ctx context.Context, req *keyservicev1.ReleaseLeaseRequest) (*keyservicev1.ReleaseLeaseResponse, error) {
	var resp *keyservicev1.ReleaseLeaseResponse
	err := s.decide(ctx, ask{event: "release-lease", volume: req.GetVolumeId(), ops: toHold, always: true}, func(d *decision) error {
		c := d.caller.callerFor("", req.GetLeaseId(), keyservicev1.Protocol)
		rec, err := s.volumes.Update(ctx, req.GetVolumeId(), func(r *volume.Record) error {
			if err := d.exists(r); err != nil {
				return err
			}
			return r.Release(c)
		})
		if err != nil {
			return err
		}
		d.note(rec)
		d.entry.Lease, d.entry.Holder = hexed(req.GetLeaseId()), c.Holder.String()
		resp = &keyservicev1.ReleaseLeaseResponse{CorrelationId: d.entry.CorrelationID}
		return s.audit.Append(*d.entry)
	})
	return answered(resp, err)
}
