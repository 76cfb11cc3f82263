package keyservice

import (
	"context"
	"encoding/hex"
	"fmt"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/volume"
	"github.com/keyagent/keyagent/kms"
)

// GetKey implements the service.
func (s *Service) GetKey(ctx context.Context, req *keyservicev1.GetKeyRequest) (*keyservicev1.GetKeyResponse, error) {
	var resp *keyservicev1.GetKeyResponse
	wants := ask{event: "get-key", volume: req.GetVolumeId(), ops: operations[req.GetOperation()], readOnly: req.GetReadOnly(), offline: req.GetOpenedOffline()}
	err := s.decide(ctx, wants, func(d *decision) (err error) {
		resp, err = s.release(ctx, d, req)
		return err
	})
	return resp, err
}

// release seals the key of the volume to the caller. The record names the caller
// before that, where one node writes.
func (s *Service) release(ctx context.Context, d *decision, req *keyservicev1.GetKeyRequest) (*keyservicev1.GetKeyResponse, error) {
	if n := req.GetLength(); n != 0 && (n < kms.MinLength || n > kms.MaxLength) {
		return nil, failure.Newf(failure.Usage, "", "a key of %d bytes: allowed are %d to %d", n, kms.MinLength, kms.MaxLength)
	}
	seen, err := s.witness(ctx, d.entry, req.GetCheckpoints())
	if err != nil {
		return nil, err
	}
	c := d.caller.callerFor(req.GetNode(), req.GetLeaseId(), req.GetProtocol())
	rec, err := s.recordFor(ctx, d, c, req)
	if err != nil {
		return nil, err
	}
	d.note(rec)
	resp := &keyservicev1.GetKeyResponse{
		State: rec.State.Proto(), Generation: rec.Generation, KeyVersion: rec.KeyVersion,
		LuksUuid: rec.LUKSUUID, CorrelationId: d.entry.CorrelationID,
	}
	var copies [][]byte
	if resp.HeaderMac, copies, err = rec.MACs(); err != nil {
		return nil, err
	}
	if c.Protocol >= keyservicev1.Protocol {
		resp.Protocol, resp.CopyMacs, resp.Writers, resp.Lease = keyservicev1.Protocol, copies, d.terms().Proto(), leaseOf(rec)
		if rec.State == volume.Formatted {
			if resp.Attempt, err = hex.DecodeString(rec.Attempt.ID); err != nil {
				return nil, fmt.Errorf("%w: %w", volume.ErrRecord, err)
			}
		}
	}
	s.keepOffline(ctx, d, req, rec, resp)
	dek, err := s.unwrap(ctx, rec)
	if err != nil {
		return nil, err
	}
	defer dek.Close()
	if resp.SealedDek, err = d.caller.channel.Seal(keyservicev1.SealInfo(req.GetVolumeId(), req.GetOperation(), resp), dek); err != nil {
		return nil, err
	}
	for _, w := range d.Warnings {
		s.log.WarnContext(ctx, "a reference value is warn_only and does not fit", "correlation_id", d.entry.CorrelationID, "mismatch", w.String())
		s.metrics.warned(w.Field)
	}
	if err := s.audit.Append(*d.entry); err != nil {
		return nil, err
	}
	return resp, s.addCheckpoint(resp, seen)
}

func (s *Service) unwrap(ctx context.Context, rec *volume.Record) (*secret.Bytes, error) {
	b, w, err := rec.Binding()
	if err != nil {
		return nil, err
	}
	dek, err := s.kms.Unwrap(ctx, b, w)
	if err != nil {
		return nil, fmt.Errorf("key of volume %q: %w", rec.VolumeID, err)
	}
	return dek, nil
}

// recordFor finds the record that the operation works on, and takes the lease in it.
// Only an operation that may format makes one.
func (s *Service) recordFor(ctx context.Context, d *decision, c *volume.Caller, req *keyservicev1.GetKeyRequest) (*volume.Record, error) {
	format := req.GetOperation() == keyservicev1.Operation_OPERATION_FORMAT
	find := func() (*volume.Record, error) {
		if format && c.Protocol >= keyservicev1.Protocol {
			return s.volumes.Obtain(ctx, req.GetVolumeId(), d.Grant, int(req.GetLength()))
		}
		return s.volumes.Get(ctx, req.GetVolumeId())
	}
	rec, err := find()
	if err != nil {
		if format && c.Protocol < keyservicev1.Protocol && isAbsent(err) {
			return nil, oldNode(volume.Absent)
		}
		return nil, err
	}
	if rec.State.HoldsData() && format {
		// Who may only create volumes does not get the key of one with data. From here
		// on it is the grant to open that counts: its owners, and its terms.
		open, err := d.also(policy.Open)
		if err != nil {
			return nil, err
		}
		d.Decision, d.entry.Grant, d.entry.Profile = open, open.Grant, open.Profile
	}
	if err := d.mustOwn(rec); err != nil {
		return nil, err
	}
	switch {
	case rec.State == volume.Retired:
		return nil, fmt.Errorf("%w: %q", volume.ErrRetired, rec.VolumeID)
	}
	// Before a lease is taken for a key that is not given.
	if err := rec.CheckLength(int(req.GetLength())); err != nil {
		return nil, err
	}
	switch {
	case req.GetOperation() == keyservicev1.Operation_OPERATION_CLONE && rec.State == volume.Rotating:
		return nil, fmt.Errorf("%w: %q", volume.ErrRotating, rec.VolumeID) // which header the copy has, nobody knows
	case req.GetOperation() == keyservicev1.Operation_OPERATION_CLONE && rec.State == volume.Active:
		// Nobody writes the disk for it: who holds the volume may go on.
		read := *rec
		read.Lease = nil
		return &read, nil
	case isRotation(req) && rec.State.HoldsData():
		return s.rotating(ctx, d, c, req, rec)
	case rec.State.HoldsData():
	case !format:
		return nil, fmt.Errorf("%w: it is %s", volume.ErrNotActive, rec.State)
	case c.Protocol < keyservicev1.Protocol:
		return nil, oldNode(rec.State)
	case rec.State == volume.Pending:
		return rec, rec.Free(c, s.now())
	}
	if req.GetDiskless() {
		// A disk that is being created keeps its attempt: nothing is taken for its key.
		without, err := withoutDisk(rec)
		if err != nil || rec.State.HoldsData() {
			return without, err
		}
	}
	id := volume.NewID()
	state := rec.State
	return s.volumes.Update(ctx, req.GetVolumeId(), func(r *volume.Record) error {
		if err := d.mustOwn(r); err != nil {
			return err
		}
		if r.State != state && !(r.State.HoldsData() && state.HoldsData()) {
			return fmt.Errorf("%w: it became %s", volume.ErrTransition, r.State)
		}
		if req.GetDiskless() {
			// Who crashed before it confirmed writes nothing: nobody waits for it.
			without, err := withoutDisk(r)
			if err != nil {
				return err
			}
			r.Lease = without.Lease
		}
		return r.Take(c, d.terms(), id, s.volumes.Ends(r), s.now())
	})
}

// withoutDisk is the record of a key that opens no disk. Any number of nodes may have
// it, and none holds it. What stands in the place of a header's MACs is one value,
// which no disk has; records of before have the one alone.
func withoutDisk(rec *volume.Record) (*volume.Record, error) {
	for _, m := range rec.CopyMACs {
		if m != rec.HeaderMAC {
			return nil, fmt.Errorf("%w: volume %q has a disk", volume.ErrConfirm, rec.VolumeID)
		}
	}
	out := *rec
	out.Lease = nil
	return &out, nil
}

func oldNode(state volume.State) error {
	if state == volume.Absent {
		state = "absent"
	}
	return fmt.Errorf("%w: upgrade it before it creates volumes; the volume is %s", volume.ErrOldNode, state)
}

// terms of the grant.
func (d *decision) terms() volume.Terms {
	return volume.Terms{Writers: d.Writers, Expiry: d.Expiry, Term: d.Lease}
}

// note puts what the record is now into the audit entry.
func (d *decision) note(r *volume.Record) {
	d.entry.Revision, d.entry.KeyVersion = r.Revision, r.KeyVersion
	d.entry.Lease, d.entry.Attempt, d.entry.Holder = "", "", ""
	if r.Attempt != nil {
		d.entry.Attempt, d.entry.Holder = r.Attempt.ID, r.Attempt.Holder.String()
	}
	if r.Lease != nil {
		d.entry.Lease, d.entry.Holder = r.Lease.ID, r.Lease.Holder.String()
	}
}

// leaseOf is the lease in a record, as the protocol has it.
func leaseOf(r *volume.Record) *keyservicev1.Lease {
	if r.Lease == nil {
		return nil
	}
	id, err := hex.DecodeString(r.Lease.ID)
	if err != nil {
		return nil // a record that parsed has an ID
	}
	return &keyservicev1.Lease{Id: id, TermMs: uint64(r.Lease.TermMS), Bound: r.Lease.Bound}
}
