package keyservice

import (
	"context"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/volume"
)

// RetireVolume implements the service. Whose grant says so ends the life of a volume that
// nobody else holds. One that is retired is retired.
func (s *Service) RetireVolume(ctx context.Context, req *keyservicev1.RetireVolumeRequest) (*keyservicev1.RetireVolumeResponse, error) {
	var resp *keyservicev1.RetireVolumeResponse
	err := s.decide(ctx, ask{event: "retire-volume", volume: req.GetVolumeId(), ops: []policy.Operation{policy.Retire}}, func(d *decision) error {
		c := d.caller.callerFor("", req.GetLeaseId(), keyservicev1.Protocol)
		rec, err := s.volumes.Update(ctx, req.GetVolumeId(), func(r *volume.Record) error {
			if err := d.exists(r); err != nil {
				return err
			}
			return r.RetireBy(c, s.volumes.Ends(r), s.now())
		})
		if err != nil {
			return err
		}
		d.note(rec)
		d.entry.Holder = c.Holder.String()
		kept := s.purge(ctx, d.entry, req.GetVolumeId()) != ""
		resp = &keyservicev1.RetireVolumeResponse{LuksUuid: rec.LUKSUUID, RecordKept: kept, CorrelationId: d.entry.CorrelationID}
		return s.audit.Append(*d.entry)
	})
	return answered(resp, err)
}
