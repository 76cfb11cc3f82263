package keyservice

import (
	"context"
	"fmt"
	"time"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/volume"
)

// keepOffline says in the answer whether the caller may keep the key for openings without
// this service, and in the audit entry what it was told. A refusal of that refuses no key.
func (s *Service) keepOffline(ctx context.Context, d *decision, req *keyservicev1.GetKeyRequest, rec *volume.Record, resp *keyservicev1.GetKeyResponse) {
	if req.GetOffline() == nil {
		return
	}
	grant, err := d.offline(req, rec, resp)
	if err != nil {
		resp.OfflineRefused, d.entry.Offline = err.Error(), "refused: "+err.Error()
		s.log.WarnContext(ctx, "no key is left with the machine for an outage", "correlation_id", d.entry.CorrelationID,
			"identity", d.entry.Identity, "volume", rec.VolumeID, "grant", d.Grant, "error", err)
		return
	}
	resp.Offline = grant
	d.entry.Offline = fmt.Sprintf("for %s of the TPM's clock and %d boots", time.Duration(grant.GetLimits().GetForMs())*time.Millisecond, grant.GetLimits().GetBoots())
}

// offline is what the caller may keep the key for. Its errors tell the machine no more than
// which part of it is missing.
func (d *decision) offline(req *keyservicev1.GetKeyRequest, rec *volume.Record, resp *keyservicev1.GetKeyResponse) (*keyservicev1.OfflineGrant, error) {
	const most = uint64(policy.MaxOffline / time.Millisecond)
	wants := policy.OfflineLimits{For: time.Duration(min(req.GetOffline().GetForMs(), most)) * time.Millisecond, Boots: req.GetOffline().GetBoots()}
	limits := d.Offline.Least(wants)
	switch {
	case d.Offline == policy.OfflineLimits{}:
		return nil, fmt.Errorf("its grant does not allow it")
	case limits.For <= 0 || limits.Boots == 0:
		return nil, fmt.Errorf("it asks for nothing")
	case req.GetOperation() != keyservicev1.Operation_OPERATION_OPEN || resp.GetState() != keyservicev1.VolumeState_VOLUME_STATE_ACTIVE || req.GetReadOnly() || req.GetDiskless():
		return nil, fmt.Errorf("the key is not of an active volume that is opened for writing")
	case resp.GetLease() == nil:
		return nil, fmt.Errorf("there is no lease that keeps other writers away meanwhile")
	case rec.Lease.Bound:
		return nil, fmt.Errorf("the lease ends by itself: another node may write the volume meanwhile")
	}
	pcrs, digest, err := d.appraisal.SealedTo()
	if err != nil {
		return nil, err
	}
	return &keyservicev1.OfflineGrant{
		Limits: &keyservicev1.OfflineLimits{ForMs: uint64(limits.For / time.Millisecond), Boots: limits.Boots}, Pcrs: pcrs, PcrDigest: digest[:],
	}, nil
}

// openedOffline records what a machine says that it did without this service. entry is that
// of its request.
func (s *Service) openedOffline(ctx context.Context, entry audit.Entry, r *keyservicev1.OfflineReport) error {
	const longest = 100 * 365 * 24 * time.Hour
	since := time.Duration(min(r.GetSinceMs(), uint64(longest/time.Millisecond))) * time.Millisecond
	entry.Event, entry.Operation, entry.Result = "opened-offline", "", "reported"
	entry.Offline = fmt.Sprintf("in %d boots, the first time %s ago by the TPM's clock", r.GetBoots(), since.Round(time.Second))
	s.log.WarnContext(ctx, "a machine opened a volume without the key service", "correlation_id", entry.CorrelationID,
		"identity", entry.Identity, "volume", entry.Volume, "boots", r.GetBoots(), "since", since.Round(time.Second))
	return s.audit.Append(entry)
}
