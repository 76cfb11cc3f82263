package keyservice

import (
	"context"
	"fmt"
	"time"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/proof"
	"github.com/keyagent/keyagent/internal/volume"
)

func isRotation(req *keyservicev1.GetKeyRequest) bool {
	op := req.GetOperation()
	return op == keyservicev1.Operation_OPERATION_ROTATE || op == keyservicev1.Operation_OPERATION_NEXT
}

// rotating is the record with the key that the volume is to have. It takes the lease as an
// opening does, and makes that key if that is asked for and there is none.
func (s *Service) rotating(ctx context.Context, d *decision, c *volume.Caller, req *keyservicev1.GetKeyRequest, rec *volume.Record) (*volume.Record, error) {
	begins := req.GetOperation() == keyservicev1.Operation_OPERATION_ROTATE
	var key volume.WrappedDEK
	if begins {
		if d.Writers != policy.WritersOne || req.GetReadOnly() {
			return nil, fmt.Errorf("%w: only the one node that writes it can do that, and its grant has other writers", volume.ErrNoRotation)
		}
		if !rec.Wants(s.now()) {
			if _, err := d.also(policy.Rotate); err != nil {
				return nil, err
			}
		}
		if rec.State == volume.Active {
			var err error
			if key, err = s.volumes.NewKey(ctx, rec.NextKey()); err != nil {
				return nil, err
			}
		}
	}
	id := volume.NewID()
	rec, err := s.volumes.Update(ctx, rec.VolumeID, func(r *volume.Record) error {
		if err := d.exists(r); err != nil {
			return err
		}
		if !begins && r.State != volume.Rotating || !r.State.HoldsData() {
			return fmt.Errorf("%w: it is %s", volume.ErrRotation, r.State)
		}
		if err := r.Take(c, d.terms(), id, s.volumes.Ends(r), s.now()); err != nil {
			return err
		}
		if begins {
			return r.BeginRotation(key)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return rec.Next()
}

// RotateKey implements the service. It needs no more of the grant than to open the volume:
// who began had it, and who holds the volume since may finish.
func (s *Service) RotateKey(ctx context.Context, req *keyservicev1.RotateKeyRequest) (*keyservicev1.RotateKeyResponse, error) {
	var resp *keyservicev1.RotateKeyResponse
	step, known := rotationSteps[req.GetStep()]
	err := s.decide(ctx, ask{event: "rotate-key", volume: req.GetVolumeId(), ops: []policy.Operation{policy.Open}}, func(d *decision) error {
		if !known {
			return failure.Newf(failure.Usage, "", "unknown step")
		}
		c := d.caller.callerFor("", req.GetLeaseId(), keyservicev1.Protocol)
		d.entry.Lease, d.entry.Holder, d.entry.Detail = hexed(req.GetLeaseId()), c.Holder.String(), step.name
		header := volume.Header{Generation: req.GetGeneration(), KeyVersion: req.GetKeyVersion(), MAC: req.GetHeaderMac(), CopyMACs: req.GetCopyMacs()}
		changed := false
		rec, err := s.volumes.Update(ctx, req.GetVolumeId(), func(r *volume.Record) error {
			if err := d.exists(r); err != nil {
				return err
			}
			before := *r
			if err := step.apply(r, c, header, s.now()); err != nil {
				return err
			}
			if r.State == volume.Active && before.State == volume.Active {
				return nil // it was done before, and nothing changes
			}
			next, err := before.Next()
			if err != nil {
				return err
			}
			next.HeaderMAC, next.CopyMACs = hexed(header.MAC), hexedAll(header.CopyMACs)
			changed = true
			return s.prove(ctx, d, next, step.proof, req.GetLeaseId(), req.GetProof())
		})
		if err != nil {
			return err
		}
		d.note(rec)
		resp = &keyservicev1.RotateKeyResponse{KeyVersion: rec.KeyVersion, CorrelationId: d.entry.CorrelationID}
		if !changed {
			return nil
		}
		return s.audit.Append(*d.entry)
	})
	return answered(resp, err)
}

// rotationStep is one step of the change of a key.
type rotationStep struct {
	name, proof string
	apply       func(*volume.Record, *volume.Caller, volume.Header, time.Time) error
}

var rotationSteps = map[keyservicev1.RotationStep]rotationStep{
	keyservicev1.RotationStep_ROTATION_STEP_BEGIN: {"begin", proof.RotateBegin,
		func(r *volume.Record, c *volume.Caller, h volume.Header, _ time.Time) error {
			return r.NextHeader(c, h)
		}},
	keyservicev1.RotationStep_ROTATION_STEP_STANDS: {"stands", proof.RotateStands,
		func(r *volume.Record, c *volume.Caller, h volume.Header, _ time.Time) error {
			return r.NextStands(c, h.MAC)
		}},
	keyservicev1.RotationStep_ROTATION_STEP_DONE: {"done", proof.RotateDone,
		func(r *volume.Record, c *volume.Caller, h volume.Header, now time.Time) error {
			return r.Rotated(c, h.KeyVersion, h.MAC, now)
		}},
}

// AskRotation has the key of a volume changed by the node that holds it.
func (s *Service) AskRotation(ctx context.Context, who, id string, every time.Duration) (VolumeInfo, error) {
	return s.operate(ctx, "volume-rotate", who, id, func(e *audit.Entry) (*volume.Record, error) {
		if every > 0 {
			e.Detail = "every " + every.String()
		}
		return s.existing(ctx, id, func(r *volume.Record) error { return r.Ask(every, s.now()) })
	})
}

// AbandonRotation leaves a volume the key that it has. force does so although the next
// header stands.
func (s *Service) AbandonRotation(ctx context.Context, who, id string, force bool) (VolumeInfo, error) {
	return s.operate(ctx, "volume-rotate-abandon", who, id, func(e *audit.Entry) (*volume.Record, error) {
		return s.existing(ctx, id, func(r *volume.Record) error {
			if r.Rotation != nil {
				e.Detail = fmt.Sprintf("key version %d, next header %s, stands: %v", r.Rotation.KeyVersion, r.Rotation.HeaderMAC, r.Rotation.Stands)
			}
			return r.AbandonRotation(force)
		})
	})
}
