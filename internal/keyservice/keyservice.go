// Package keyservice is the key service: it verifies evidence, applies policy,
// owns volume records and releases DEKs.
//
// Every decision is in the audit log, on the disk, before a key leaves. A
// refused machine learns the class of its refusal and a correlation ID; the
// service's own log has the rest under the same ID.
package keyservice

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"time"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/policysource"
	"github.com/keyagent/keyagent/internal/record"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage"
)

// Options configure [New]. All are required but Now.
type Options struct {
	Policy  *policysource.Source
	KMS     kms.KMS
	Storage storage.Storage
	Audit   *audit.Log
	Log     *slog.Logger
	Metrics *Metrics
	// Seen are revisions of volumes that the audit log names.
	Seen map[string]uint64
	// RecordKey is the ID that the record MAC key must have. Default any,
	// unless anybody can wrap under the KEK.
	RecordKey string
	// RecordKeyPinned says that RecordKey is the operator's word, and not only what
	// the audit log says.
	RecordKeyPinned bool
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// Service implements the gRPC service. Create it with New.
type Service struct {
	keyservicev1.UnimplementedKeyServiceServer
	policy  *policysource.Source
	kms     kms.KMS
	records *records
	audit   *audit.Log
	log     *slog.Logger
	metrics *Metrics
	now     func() time.Time
	slots   chan struct{} // bounds the requests under way
}

// maxUnderWay bounds how many requests are worked on at once; more wait.
const maxUnderWay = 64

// New opens the records in storage.
func New(ctx context.Context, opts Options) (*Service, error) {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	r, err := openRecords(ctx, opts.KMS, opts.Storage, opts.Now, func(id string) error {
		// Before it is stored: a crash in between leaves an ID of nothing, and never
		// a key that is not known.
		return opts.Audit.Append(audit.Entry{Event: "record-key", RecordKey: id, Result: "allowed"})
	})
	if err != nil {
		return nil, err
	}
	known := opts.RecordKey
	if r.book.Made() && len(opts.Seen) == 0 && !opts.RecordKeyPinned {
		known = "" // an earlier first start was cut short before it stored its key
	}
	if err := r.book.Trust(opts.KMS, known); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	for volume, revision := range opts.Seen {
		r.noteRevision(volume, revision)
	}
	return &Service{
		policy: opts.Policy, kms: opts.KMS, records: r, audit: opts.Audit, log: opts.Log,
		metrics: opts.Metrics, now: opts.Now, slots: make(chan struct{}, maxUnderWay),
	}, nil
}

// RecordKey names the key that authenticates the records.
func (s *Service) RecordKey() (string, error) { return s.records.book.KeyID() }

// Close wipes what the service holds.
func (s *Service) Close() error { return s.records.Close() }

// caller is an attested peer that made a request.
type caller struct {
	channel  *atls.Channel
	verified *attestation.Verified
	id       string // correlation ID of the attestation
}

func callerOf(ctx context.Context) (caller, error) {
	ch, ok := atls.FromContext(ctx)
	if !ok {
		return caller{}, failure.Newf(failure.EvidenceRefused, "", "the connection is not attested")
	}
	v, id, err := ch.Peer()
	if err != nil {
		return caller{}, failure.New(failure.EvidenceRefused, err, "attest again")
	}
	return caller{ch, v, id}, nil
}

var operations = map[keyservicev1.Operation]policy.Operation{
	keyservicev1.Operation_OPERATION_OPEN:   policy.Open,
	keyservicev1.Operation_OPERATION_FORMAT: policy.Format,
}

var states = map[State]keyservicev1.VolumeState{
	Pending: keyservicev1.VolumeState_VOLUME_STATE_PENDING,
	Active:  keyservicev1.VolumeState_VOLUME_STATE_ACTIVE,
}

// GetKey implements the service.
func (s *Service) GetKey(ctx context.Context, req *keyservicev1.GetKeyRequest) (*keyservicev1.GetKeyResponse, error) {
	var resp *keyservicev1.GetKeyResponse
	err := s.decide(ctx, "get-key", req.GetVolumeId(), operations[req.GetOperation()], func(d *decision) (err error) {
		resp, err = s.release(ctx, d, req)
		return err
	})
	return resp, err
}

// ConfirmVolume implements the service. It needs the grant under which the
// volume may be formatted.
func (s *Service) ConfirmVolume(ctx context.Context, req *keyservicev1.ConfirmVolumeRequest) (*keyservicev1.ConfirmVolumeResponse, error) {
	var resp *keyservicev1.ConfirmVolumeResponse
	err := s.decide(ctx, "confirm-volume", req.GetVolumeId(), policy.Format, func(d *decision) error {
		rec, _, err := s.records.get(ctx, req.GetVolumeId())
		if err != nil {
			return err
		}
		if err := owned(rec, d.Owners); err != nil {
			return err
		}
		if rec, err = s.records.confirm(ctx, req.GetVolumeId(), req.GetGeneration(), req.GetKeyVersion(), req.GetHeaderMac()); err != nil {
			return err
		}
		d.entry.Revision, d.entry.KeyVersion = rec.Revision, rec.KeyVersion
		resp = &keyservicev1.ConfirmVolumeResponse{State: states[rec.State], Generation: rec.Generation, CorrelationId: d.entry.CorrelationID}
		return s.audit.Append(*d.entry)
	})
	return resp, err
}

// Reattest implements the service.
func (s *Service) Reattest(stream keyservicev1.KeyService_ReattestServer) error {
	ctx, cancel := context.WithTimeout(stream.Context(), atls.DefaultTimeout)
	defer cancel()
	ch, ok := atls.FromContext(ctx)
	if !ok {
		return failure.Status(failure.Newf(failure.EvidenceRefused, "", "not attested"), "the connection is not attested")
	}
	if err := ch.Reattest(ctx, stream); err != nil {
		// The exchange's own verdict said what the peer may know.
		return failure.Status(failure.New(failure.EvidenceRefused, err, ""), string(failure.EvidenceRefused))
	}
	return nil
}

// decision is one request on its way to its audit entry.
type decision struct {
	policy.Decision
	caller caller
	entry  *audit.Entry
	// also authorises another operation of the same caller on the volume.
	also func(policy.Operation) error
}

// decide authorises a request, runs act, and records a refusal, whoever refused.
// act itself appends the entry of what it allows, at the moment that it chooses.
func (s *Service) decide(ctx context.Context, event, volume string, op policy.Operation, act func(*decision) error) error {
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	started := s.now()
	entry := &audit.Entry{Event: event, CorrelationID: newID(), Volume: volume, Operation: string(op), Result: "allowed"}
	if !policy.ValidVolume(volume) {
		entry.Volume = fmt.Sprintf("%q", volume[:min(len(volume), 64)])
	}
	err := s.authorize(ctx, entry, volume, op, act)
	s.metrics.request(event, err, s.now().Sub(started))
	if err == nil {
		s.log.InfoContext(ctx, "allowed", "event", event, "correlation_id", entry.CorrelationID, "identity", entry.Identity,
			"volume", entry.Volume, "operation", entry.Operation, "grant", entry.Grant, "profile", entry.Profile, "revision", entry.Revision)
		return nil
	}
	return s.refuse(ctx, entry, err)
}

func (s *Service) authorize(ctx context.Context, entry *audit.Entry, volume string, op policy.Operation, act func(*decision) error) error {
	c, err := callerOf(ctx)
	if err != nil {
		return err
	}
	entry.Identity, entry.Evidence = c.verified.Identity(), evidenceDigest(c.verified)
	if op == "" {
		return failure.Newf(failure.Usage, "", "unknown operation")
	}
	// The policy in force decides, and not the one of the handshake: what was
	// withdrawn in between is withdrawn.
	p := s.policy.Current()
	entry.Policy = p.Hash()
	a, err := p.Appraise(c.verified)
	if err != nil {
		return failure.New(failure.EvidenceRefused, err, "")
	}
	d, err := p.Authorize(a, policy.Request{Volume: volume, Operation: op, Now: s.now()})
	if err != nil {
		return failure.New(failure.PolicyDenied, err, "")
	}
	entry.Grant, entry.Profile = d.Grant, d.Profile
	also := func(other policy.Operation) error {
		_, err := p.Authorize(a, policy.Request{Volume: volume, Operation: other, Now: s.now()})
		return failure.New(failure.PolicyDenied, err, "")
	}
	return act(&decision{Decision: d, caller: c, entry: entry, also: also})
}

// refuse logs, audits and answers. The caller learns no more than the class,
// unless its policy shows it the difference.
func (s *Service) refuse(ctx context.Context, entry *audit.Entry, err error) error {
	err = failure.WithID(classify(err), entry.CorrelationID)
	class := failure.Of(err).Class
	entry.Result, entry.Class, entry.Detail = "refused", string(class), err.Error()
	s.log.WarnContext(ctx, "refused", "event", entry.Event, "correlation_id", entry.CorrelationID, "class", class,
		"identity", entry.Identity, "volume", entry.Volume, "operation", entry.Operation, "error", err)
	if auditErr := s.audit.Append(*entry); auditErr != nil {
		s.log.ErrorContext(ctx, "the audit log does not take entries", "error", auditErr)
	}
	message := fmt.Sprintf("%s (correlation id %s)", class, entry.CorrelationID)
	var m *policy.MismatchError
	if errors.As(err, &m) && m.PeerDetail() != "" {
		message += ": " + m.PeerDetail()
	}
	return failure.Status(err, message)
}

// classify gives the errors of this package's own parts their class and the
// hint that the caller may see.
func classify(err error) error {
	for _, row := range []struct {
		is    error
		class failure.Class
		hint  string
	}{
		{ErrNoVolume, failure.NotFound, "the volume was never formatted: keyagent format does it, on a blank disk"},
		{ErrOwner, failure.PolicyDenied, ""},
		{ErrConfirm, failure.State, ""},
		{ErrTransition, failure.State, ""},
		{ErrNoRecords, failure.NotFound, "is it the right storage, with the right prefix?"},
		{ErrRecipient, failure.Configuration, "keyagent kms recipient prints one"},
		{ErrExport, failure.Tampered, ""},
		{ErrDigest, failure.Tampered, "export it again, or give the digest that the export printed"},
		{ErrExists, failure.State, "nothing was overwritten"},
		{errNotActive, failure.State, "its first format did not finish: run it again"},
		{ErrRollback, failure.Tampered, ""},
		{ErrRecord, failure.Tampered, ""},
		{record.ErrMACKey, failure.Tampered, ""},
		{record.ErrNotStored, failure.Tampered, ""},
		{atls.ErrExpired, failure.EvidenceRefused, "attest again"},
	} {
		if errors.Is(err, row.is) {
			return failure.New(row.class, err, row.hint)
		}
	}
	for _, row := range backendErrors {
		switch {
		case !errors.Is(err, row.is):
			continue
		case row.final:
			return failure.New(row.class, err, "")
		}
		return failure.New(failure.Unreachable, err, "the key service's log says what it lacks; try again later")
	}
	return err
}

// forOperator is classify for who stands before the service and its backends.
func forOperator(err error) error {
	for _, row := range backendErrors {
		// What this package's own errors wrap is no cause of theirs.
		if errors.Is(err, row.is) && !errors.Is(err, ErrRecord) && !errors.Is(err, ErrRollback) && !errors.Is(err, record.ErrMACKey) {
			return failure.New(row.class, err, row.operator)
		}
	}
	return classify(err)
}

var errNotActive = errors.New("volume is not active")

func owned(rec *Record, owners []string) error {
	for _, o := range owners {
		if o == rec.Owner {
			return nil
		}
	}
	return fmt.Errorf("%w: volume %q was made under %q", ErrOwner, rec.VolumeID, rec.Owner)
}

// release seals the key of the volume to the caller.
func (s *Service) release(ctx context.Context, d *decision, req *keyservicev1.GetKeyRequest) (*keyservicev1.GetKeyResponse, error) {
	rec, err := s.recordFor(ctx, d, req)
	if err != nil {
		return nil, err
	}
	if err := owned(rec, d.Owners); err != nil {
		return nil, err
	}
	d.entry.Revision, d.entry.KeyVersion = rec.Revision, rec.KeyVersion
	resp := &keyservicev1.GetKeyResponse{
		State: states[rec.State], Generation: rec.Generation, KeyVersion: rec.KeyVersion,
		LuksUuid: rec.LUKSUUID, CorrelationId: d.entry.CorrelationID,
	}
	if rec.State == Active {
		if resp.HeaderMac, err = hex.DecodeString(rec.HeaderMAC); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrRecord, err)
		}
	}
	b, w, err := rec.binding()
	if err != nil {
		return nil, err
	}
	dek, err := s.kms.Unwrap(ctx, b, w)
	if err != nil {
		return nil, fmt.Errorf("key of volume %q: %w", rec.VolumeID, err)
	}
	defer dek.Close()
	if resp.SealedDek, err = s.seal(d.caller, req, resp, dek); err != nil {
		return nil, err
	}
	for _, w := range d.Warnings {
		s.log.WarnContext(ctx, "a reference value is warn_only and does not fit", "correlation_id", d.entry.CorrelationID, "mismatch", w.String())
		s.metrics.warned(w.Field)
	}
	return resp, s.audit.Append(*d.entry)
}

func (s *Service) seal(c caller, req *keyservicev1.GetKeyRequest, resp *keyservicev1.GetKeyResponse, dek *secret.Bytes) ([]byte, error) {
	return c.channel.Seal(keyservicev1.SealInfo(req.GetVolumeId(), req.GetOperation(), resp), dek)
}

// recordFor finds the record that the operation works on. Only an operation
// that may format makes one.
func (s *Service) recordFor(ctx context.Context, d *decision, req *keyservicev1.GetKeyRequest) (*Record, error) {
	var rec *Record
	var err error
	if req.GetOperation() == keyservicev1.Operation_OPERATION_FORMAT {
		rec, err = s.records.obtain(ctx, req.GetVolumeId(), d.Grant)
	} else {
		rec, _, err = s.records.get(ctx, req.GetVolumeId())
	}
	switch {
	case err != nil:
		return nil, err
	case rec.State == Pending && req.GetOperation() == keyservicev1.Operation_OPERATION_FORMAT:
		return rec, nil
	case rec.State == Active:
		// Who may only create volumes does not get the key of one with data.
		return rec, d.also(policy.Open)
	}
	return nil, fmt.Errorf("%w: it is %s", errNotActive, rec.State)
}

// newID returns a correlation ID.
func newID() string { return rand.Text()[:16] }

func evidenceDigest(v *attestation.Verified) string {
	out := ""
	for i, c := range v.All() {
		if i > 0 {
			out += "+"
		}
		out += hex.EncodeToString(c.EvidenceDigest[:])
	}
	return out
}
