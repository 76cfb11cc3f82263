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
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/policysource"
	"github.com/keyagent/keyagent/internal/recovery"
	"github.com/keyagent/keyagent/internal/revocation"
	"github.com/keyagent/keyagent/internal/volume"
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
	// Words of revocation that it names.
	Words []revocation.Word
	// Recovery is nil if no person gets a key. Recovered are the requests that the audit log has.
	Recovery  *RecoveryConfig
	Recovered map[string]time.Time
	// RecordKey is the ID that the record MAC key must have. Default any,
	// unless anybody can wrap under the KEK.
	RecordKey string
	// RecordKeyPinned says that RecordKey is the operator's word, and not only what
	// the audit log says.
	RecordKeyPinned bool
	// Alone says that no other key service has the storage.
	Alone bool
	// Master is the master secret, for replicas that the policy has. It stays the caller's.
	// Nil: there is none to give.
	Master *kms.Secret
	// Joined is who gave this key service its master secret, if another one did. Then
	// there are records, unless InitRecords is an operator's word that there are none.
	Joined      string
	InitRecords bool
	// Epoch is when an operator gave up all records the last time, see [volume.Seen], by the
	// audit log. EpochMAC shows that a key service wrote it, and not who writes its disk.
	Epoch    uint64
	EpochMAC string
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// ErrOwner means that the volume was made under another grant.
var ErrOwner = errors.New("volume belongs to another grant")

// Service implements the gRPC service. Create it with New.
type Service struct {
	keyservicev1.UnimplementedKeyServiceServer
	policy  *policysource.Source
	kms     kms.KMS
	records *macstore.Store
	volumes *volume.Store
	revoked *revocation.Book
	// recovery is nil if it is off.
	recovery *recoveries
	audit    *audit.Log
	book     *logbook
	epochs   *epochs
	log      *slog.Logger
	metrics  *Metrics
	now      func() time.Time
	slots    chan struct{} // bounds the requests under way
	forget   forgetting
	master   *kms.Secret
	// heard is closed once replicas were asked what they have seen: a storage that went back
	// before this start is known to them alone. Nil: there are none.
	heard   <-chan struct{}
	renewal time.Duration // bounds one renewal of a verdict
}

// maxUnderWay bounds how many requests are worked on at once; more wait.
const maxUnderWay = 64

// New opens the records in storage.
func New(ctx context.Context, opts Options) (*Service, error) {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	records, err := openRecords(ctx, opts)
	if err != nil {
		return nil, err
	}
	known := opts.RecordKey
	if records.Created() && len(opts.Seen) == 0 && !opts.RecordKeyPinned {
		known = "" // an earlier first start was cut short before it stored its key
	}
	if err := records.CheckKey(opts.KMS, known); err != nil {
		return nil, errors.Join(err, records.Close())
	}
	volumes := volume.NewStore(volume.Options{KMS: opts.KMS, Records: records, Now: opts.Now, Alone: opts.Alone})
	epochs, err := openEpoch(records, volumes, opts)
	if err != nil {
		return nil, errors.Join(err, records.Close())
	}
	for id, revision := range opts.Seen {
		volumes.NoteRevision(id, revision)
	}
	revoked := revocation.NewBook(records, opts.Now, opts.Log, opts.Words)
	if err := revoked.Load(ctx); err != nil {
		return nil, errors.Join(err, records.Close())
	}
	recoveries, err := newRecoveries(opts.Recovery, opts.Recovered)
	if err != nil {
		return nil, errors.Join(err, records.Close())
	}
	book, err := newLogbook(records, opts.Audit)
	if err != nil {
		return nil, errors.Join(err, records.Close())
	}
	return &Service{
		epochs: epochs, book: book, recovery: recoveries, policy: opts.Policy, kms: opts.KMS, records: records, volumes: volumes, revoked: revoked, audit: opts.Audit, log: opts.Log,
		metrics: opts.Metrics, now: opts.Now, slots: make(chan struct{}, maxUnderWay),
		master: opts.Master, renewal: atls.DefaultTimeout,
	}, nil
}

// openRecords makes the record MAC key in a storage that is empty, unless another key service
// gave the master secret: that one has records, and this storage is another one.
func openRecords(ctx context.Context, opts Options) (*macstore.Store, error) {
	if opts.Joined == "" || opts.InitRecords {
		return macstore.Open(ctx, opts.KMS, opts.Storage, func(id string) error {
			// Before it is stored: a crash in between leaves an ID of nothing, and never
			// a key that is not known.
			return opts.Audit.Append(audit.Entry{Event: "record-key", RecordKey: id, Result: "allowed"})
		})
	}
	records, err := macstore.OpenExisting(ctx, opts.KMS, opts.Storage)
	switch {
	case errors.Is(err, storage.ErrNotFound):
		return nil, failure.Newf(failure.Tampered, "storage: has to be the one of the other key services; if its records are lost for good, start once with --init-records",
			"%s gave the master secret, and the storage has no records: %w", opts.Joined, err)
	case errors.Is(err, kms.ErrWrongKey), errors.Is(err, kms.ErrKEKVersion), errors.Is(err, macstore.ErrRefused):
		return nil, failure.New(failure.WrongKey, fmt.Errorf("the master secret that %s gave is not that of the storage's records: %w", opts.Joined, err), "storage: and kms: have to be those of the other key services, with the same salt")
	}
	return records, err
}

// RecordKey names the key that authenticates the records.
func (s *Service) RecordKey() (string, error) { return s.records.KeyID() }

// Close wipes what the service holds.
func (s *Service) Close() error {
	return errors.Join(s.epochs.Close(), s.book.Close(), s.records.Close())
}

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

// operations are what a grant must allow for each operation of the protocol: the first, or
// else one of the others.
var operations = map[keyservicev1.Operation][]policy.Operation{
	keyservicev1.Operation_OPERATION_OPEN:   {policy.Open},
	keyservicev1.Operation_OPERATION_FORMAT: {policy.Format},
	keyservicev1.Operation_OPERATION_CLONE:  {policy.Clone},
	keyservicev1.Operation_OPERATION_ROTATE: {policy.Open}, // and Rotate, unless an operator wants it
	keyservicev1.Operation_OPERATION_NEXT:   {policy.Open},
}

// Reattest implements the service.
func (s *Service) Reattest(stream keyservicev1.KeyService_ReattestServer) error {
	ctx, cancel := context.WithTimeout(stream.Context(), s.renewal)
	defer cancel()
	ch, ok := atls.FromContext(ctx)
	if !ok {
		return failure.Status(failure.Newf(failure.EvidenceRefused, "", "not attested"), "the connection is not attested")
	}
	done := make(chan error, 1)
	go func() { done <- ch.Reattest(ctx, renewal{stream}) }()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		// Returning ends the stream, and with it whatever waits for a frame on it.
		err = ctx.Err()
	}
	if err != nil {
		// The exchange's own verdict said what the peer may know.
		return failure.Status(failure.New(failure.EvidenceRefused, err, ""), string(failure.EvidenceRefused))
	}
	return nil
}

// renewal carries the frames of a renewal.
type renewal struct {
	keyservicev1.KeyService_ReattestServer
}

// Recv implements atls.Frames: what gRPC could not decode is the peer's fault.
func (r renewal) Recv() (*attestv1.Frame, error) {
	f, err := r.KeyService_ReattestServer.Recv()
	switch status.Code(err) {
	case codes.Internal, codes.ResourceExhausted:
		return nil, fmt.Errorf("%w: %w", atls.ErrFrame, err)
	}
	return f, err
}

// decision is one request on its way to its audit entry.
type decision struct {
	policy.Decision
	caller caller
	entry  *audit.Entry
	// also authorises another operation of the same caller on the volume.
	also func(policy.Operation) (policy.Decision, error)
	// appraisal is what the policy makes of the caller.
	appraisal *policy.Appraisal
}

// ask is what a caller wants: any one of the operations is enough.
type ask struct {
	event    string
	volume   string
	ops      []policy.Operation
	readOnly bool
	// always: also of a machine or a volume that is revoked. It gives something back.
	always bool
	// replica: it is another key service that asks, and for no volume.
	replica bool
	// offline is what the caller did without the key service. Nil: nothing.
	offline *keyservicev1.OfflineReport
}

// decide authorises a request, runs act, and records a refusal, no matter who refused.
// act itself appends the entry of what it allows, at the moment that it chooses.
func (s *Service) decide(ctx context.Context, a ask, act func(*decision) error) error {
	if s.heard != nil && !a.replica { // replicas that start together answer each other
		select {
		case <-s.heard:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	defer s.forget.used() // each request reads a record at least
	started := s.now()
	entry := &audit.Entry{Event: a.event, CorrelationID: newID(), Volume: a.volume, Result: "allowed"}
	if len(a.ops) > 0 {
		entry.Operation = string(a.ops[0])
	}
	if !a.replica && !policy.ValidVolume(a.volume) {
		entry.Volume = fmt.Sprintf("%q", a.volume[:min(len(a.volume), 64)])
	}
	err := s.authorize(ctx, entry, a, act)
	s.metrics.request(a.event, err, s.now().Sub(started))
	if err == nil {
		s.log.InfoContext(ctx, "allowed", "event", a.event, "correlation_id", entry.CorrelationID, "identity", entry.Identity,
			"volume", entry.Volume, "operation", entry.Operation, "grant", entry.Grant, "profile", entry.Profile, "revision", entry.Revision)
		return nil
	}
	return s.refuse(ctx, entry, err)
}

func (s *Service) authorize(ctx context.Context, entry *audit.Entry, ask ask, act func(*decision) error) error {
	c, err := callerOf(ctx)
	if err != nil {
		return err
	}
	entry.Identity, entry.Evidence = c.verified.Identity(), evidenceDigest(c.verified)
	if ask.offline != nil {
		// Whether or not it may have the volume now.
		if err := s.openedOffline(ctx, *entry, ask.offline); err != nil {
			return err
		}
	}
	if !ask.always {
		if err := s.book.err(); err != nil {
			return err
		}
		if err := s.mustNotBeRevoked(ctx, c.verified.Identities(), ask.volume); err != nil {
			return err
		}
	}
	if len(ask.ops) == 0 && !ask.replica {
		return failure.Newf(failure.Usage, "", "unknown operation")
	}
	// The policy in force decides, and not the one of the handshake: what was
	// withdrawn in between is withdrawn.
	p := s.policy.Current()
	entry.Policy = p.Hash()
	if age := s.now().Sub(c.verified.At()); age >= p.Lifetime() {
		return failure.New(failure.EvidenceRefused, fmt.Errorf("%w: the evidence is %s old, the policy in force trusts for %s",
			atls.ErrExpired, age.Round(time.Second), p.Lifetime()), "attest again")
	}
	appraise := p.Appraise
	if ask.replica {
		appraise = p.AppraiseReplica
	}
	a, err := appraise(c.verified)
	if err != nil {
		return failure.New(failure.EvidenceRefused, err, "")
	}
	if ask.replica {
		entry.Profile = a.Profile
		if err := p.AuthorizeReplica(a); err != nil {
			return failure.New(failure.PolicyDenied, err, "")
		}
		return act(&decision{caller: c, entry: entry})
	}
	allow := func(op policy.Operation) (policy.Decision, error) {
		d, err := p.Authorize(a, policy.Request{Volume: ask.volume, Operation: op, Now: s.now(), ReadOnly: ask.readOnly})
		return d, failure.New(failure.PolicyDenied, err, "")
	}
	d, err := allow(ask.ops[0])
	for _, op := range ask.ops[1:] {
		if err != nil {
			entry.Operation = string(op)
			d, err = allow(op)
		}
	}
	if err != nil {
		return err
	}
	entry.Grant, entry.Profile = d.Grant, d.Profile
	return act(&decision{Decision: d, caller: c, entry: entry, also: allow, appraisal: a})
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
	// An error that may be shown says so.
	var shown interface{ PeerDetail() string }
	if errors.As(err, &shown) && shown.PeerDetail() != "" {
		message += ": " + shown.PeerDetail()
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
		{volume.ErrLease, failure.Held, "stop writing: the lease is somebody else's, or an operator ended it"},
		{volume.ErrHeld, failure.Held, "wait, or have an operator end it on the key service: keyagent volume takeover"},
		{volume.ErrAttempt, failure.State, "begin again"},
		{volume.ErrOldNode, failure.State, "upgrade this node's keyagent before it creates volumes, or writes one whose lease ends by itself"},
		{volume.ErrNoRotation, failure.State, "keyagent kms rotate --abandon withdraws what was asked for"},
		{volume.ErrOtherNext, failure.State, "what was kept of it on the disk is lost: see the runbook, \"A volume's key is to be changed\""},
		{volume.ErrRotating, failure.State, "try again in a moment: the node that has the volume open finishes it"},
		{volume.ErrRotation, failure.State, "ask for the key again"},
		{volume.ErrLength, failure.State, "ask for the length that the volume's key was made with"},
		{errNoRecovery, failure.PolicyDenied, "recovery: in the service's configuration says who may approve"},
		{errUsed, failure.State, "make another request"},
		{errTooOften, failure.PolicyDenied, "per_day of recovery: bounds it"},
		{recovery.ErrRequest, failure.Usage, ""},
		{recovery.ErrWindow, failure.State, "make another request"},
		{recovery.ErrTooFew, failure.PolicyDenied, "ask more operators"},
		{recovery.ErrApproval, failure.PolicyDenied, "leave out what is no approval: ssh-keygen -Y sign -n keyagent-recovery -f KEY REQUEST makes one"},
		{errWentBack, failure.Tampered, wentBackHint},
		{errRevoked, failure.Revoked, "an operator did it by name, and lifts it with keyagent revoke --lift"},
		{revocation.ErrSeveral, failure.Usage, "name one of them: tpm: and nitro: are of one machine, snp: and tdx: of a processor on which others may run"},
		{revocation.ErrSubject, failure.Usage, "name a node by its identity, as the audit log and keyagent volume show have it"},
		{revocation.ErrWord, failure.Usage, ""},
		{revocation.ErrNotRevoked, failure.State, "keyagent revoke --list shows what is"},
		{volume.ErrRetired, failure.State, "an operator ended its life on the key service"},
		{errProof, failure.WrongKey, ""},
		{volume.ErrNoVolume, failure.NotFound, "the volume was never formatted: keyagent format does it, on a blank disk"},
		{ErrOwner, failure.PolicyDenied, ""},
		{volume.ErrConfirm, failure.State, ""},
		{volume.ErrTransition, failure.State, ""},
		{ErrNoRecords, failure.NotFound, "is it the right storage, with the right prefix?"},
		{ErrRecipient, failure.Configuration, "keyagent kms recipient prints one"},
		{ErrExport, failure.Tampered, ""},
		{ErrDigest, failure.Tampered, "export it again, or give the digest that the export printed"},
		{ErrExists, failure.State, "nothing was overwritten"},
		{volume.ErrNotActive, failure.State, "its first format did not finish: run it again"},
		{volume.ErrRollback, failure.Tampered, ""},
		{volume.ErrRecord, failure.Tampered, ""},
		{storage.ErrCorrupt, failure.Tampered, ""},
		{macstore.ErrMACKey, failure.Tampered, ""},
		{macstore.ErrNotStored, failure.Tampered, ""},
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
		if errors.Is(err, row.is) && !errors.Is(err, volume.ErrRecord) && !errors.Is(err, volume.ErrRollback) && !errors.Is(err, macstore.ErrMACKey) {
			return failure.New(row.class, err, row.operator)
		}
	}
	return classify(err)
}

// mustOwn is for [volume.Store.Update]: it refuses a volume that was made under a grant
// which the caller's does not adopt.
func (d *decision) mustOwn(r *volume.Record) error {
	if r.State == volume.Absent || slices.Contains(d.Owners, r.Owner) {
		return nil
	}
	return fmt.Errorf("%w: volume %q was made under %q", ErrOwner, r.VolumeID, r.Owner)
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
