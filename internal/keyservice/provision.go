package keyservice

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/proof"
	"github.com/keyagent/keyagent/internal/volume"
)

// errProof means that a caller does not hold the volume's key, or got it on another
// connection.
var errProof = errors.New("the proof of the volume's key does not fit this connection and this header")

func isAbsent(err error) bool { return errors.Is(err, volume.ErrNoVolume) }

var toFormat = []policy.Operation{policy.Format}

// BeginFormat implements the service: the first compare-and-swap of a first format.
func (s *Service) BeginFormat(ctx context.Context, req *keyservicev1.BeginFormatRequest) (*keyservicev1.BeginFormatResponse, error) {
	var resp *keyservicev1.BeginFormatResponse
	err := s.decide(ctx, ask{event: "begin-format", volume: req.GetVolumeId(), ops: toFormat}, func(d *decision) error {
		c := d.caller.callerFor(req.GetNode(), nil, keyservicev1.Protocol)
		d.entry.Attempt, d.entry.Holder = hexed(req.GetAttempt()), c.Holder.String()
		if proof.Zero(binderOf(d)) {
			return fmt.Errorf("%w: the connection has no binder", errProof)
		}
		header := volume.Header{Generation: req.GetGeneration(), KeyVersion: req.GetKeyVersion(), MAC: req.GetHeaderMac(), CopyMACs: req.GetCopyMacs()}
		rec, err := s.volumes.Update(ctx, req.GetVolumeId(), func(r *volume.Record) error {
			if err := d.exists(r); err != nil {
				return err
			}
			if err := r.Begin(c, req.GetAttempt(), header, s.now()); err != nil {
				return err
			}
			return s.prove(ctx, d, r, proof.Begin, req.GetAttempt(), req.GetProof())
		})
		if err != nil {
			return err
		}
		d.note(rec)
		resp = &keyservicev1.BeginFormatResponse{TermMs: uint64(volume.AttemptTerm.Milliseconds()), CorrelationId: d.entry.CorrelationID}
		return s.audit.Append(*d.entry)
	})
	return answered(resp, err)
}

// HeaderStands implements the service: the second one. From here on the caller holds
// the lease.
func (s *Service) HeaderStands(ctx context.Context, req *keyservicev1.HeaderStandsRequest) (*keyservicev1.HeaderStandsResponse, error) {
	var resp *keyservicev1.HeaderStandsResponse
	err := s.decide(ctx, ask{event: "header-stands", volume: req.GetVolumeId(), ops: toFormat}, func(d *decision) error {
		c := d.caller.callerFor("", nil, keyservicev1.Protocol)
		d.entry.Attempt, d.entry.Holder = hexed(req.GetAttempt()), c.Holder.String()
		lease := volume.NewID()
		rec, err := s.volumes.Update(ctx, req.GetVolumeId(), func(r *volume.Record) error {
			if err := d.exists(r); err != nil {
				return err
			}
			if err := r.Stands(c, req.GetAttempt(), d.terms(), lease, s.now()); err != nil {
				return err
			}
			return s.prove(ctx, d, r, proof.Stands, req.GetAttempt(), req.GetProof())
		})
		if err != nil {
			return err
		}
		d.note(rec)
		resp = &keyservicev1.HeaderStandsResponse{State: rec.State.Proto(), Writers: d.terms().Proto(), Lease: leaseOf(rec), CorrelationId: d.entry.CorrelationID}
		return s.audit.Append(*d.entry)
	})
	return answered(resp, err)
}

// ConfirmVolume implements the service: the third one. It needs the grant under which
// the volume may be formatted.
func (s *Service) ConfirmVolume(ctx context.Context, req *keyservicev1.ConfirmVolumeRequest) (*keyservicev1.ConfirmVolumeResponse, error) {
	var resp *keyservicev1.ConfirmVolumeResponse
	err := s.decide(ctx, ask{event: "confirm-volume", volume: req.GetVolumeId(), ops: toFormat}, func(d *decision) error {
		d.entry.Attempt = hexed(req.GetAttempt())
		rec, err := s.volumes.Update(ctx, req.GetVolumeId(), func(r *volume.Record) error {
			if err := d.exists(r); err != nil {
				return err
			}
			return r.Confirm(req.GetAttempt(), req.GetGeneration(), req.GetKeyVersion(), req.GetHeaderMac(), d.Writers == policy.WritersOne)
		})
		if err != nil {
			return err
		}
		d.note(rec)
		resp = &keyservicev1.ConfirmVolumeResponse{State: rec.State.Proto(), Generation: rec.Generation, CorrelationId: d.entry.CorrelationID}
		return s.audit.Append(*d.entry)
	})
	return answered(resp, err)
}

// answered gives no answer where there is an error: nothing may be acted upon that is
// not in the audit log.
func answered[T any](resp *T, err error) (*T, error) {
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// exists is [decision.mustOwn] for a volume that must have a record.
func (d *decision) exists(r *volume.Record) error {
	if r.State == volume.Absent {
		return volume.ErrNoVolume
	}
	return d.mustOwn(r)
}

// prove demands that the caller holds the volume's key, and had it on this connection,
// with the header that the record names.
func (s *Service) prove(ctx context.Context, d *decision, r *volume.Record, step string, attempt, got []byte) error {
	in := proof.Input{Volume: r.VolumeID, Generation: r.Generation, Binder: binderOf(d), Step: step, Attempt: attempt}
	var err error
	if in.HeaderMAC, in.CopyMACs, err = r.Meant(); err != nil {
		return err
	}
	dek, err := s.unwrap(ctx, r)
	if err != nil {
		return err
	}
	defer dek.Close()
	ok, err := proof.Verify(dek, in, got)
	if err != nil {
		return fmt.Errorf("%w: %w", errProof, err)
	}
	if !ok {
		return errProof
	}
	return nil
}

func binderOf(d *decision) []byte {
	b := d.caller.channel.Binder()
	return b[:]
}

// hexed is bytes of a request for the audit log.
func hexed(b []byte) string { return hex.EncodeToString(b[:min(len(b), 64)]) }

func hexedAll(all [][]byte) []string {
	var out []string
	for _, b := range all {
		out = append(out, hexed(b))
	}
	return out
}
