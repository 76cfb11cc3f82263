package keyservice

import (
	"context"
	"errors"
	"fmt"

	replicav1 "github.com/keyagent/keyagent/api/keyagent/replica/v1"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/replica"
	"github.com/keyagent/keyagent/internal/volume"
)

// replicas answers other key services over the same storage.
type replicas struct {
	replicav1.UnimplementedReplicaServer
	*Service
}

var (
	errNoMaster    = errors.New("this key service has no master secret to give")
	errOtherRecord = errors.New("the other key service keeps its records under another record MAC key")
)

// Join implements the service. The audit log has it before the secret leaves.
func (s *replicas) Join(ctx context.Context, _ *replicav1.JoinRequest) (*replicav1.JoinResponse, error) {
	resp := &replicav1.JoinResponse{}
	err := s.decide(ctx, ask{event: "replica-join", replica: true}, func(d *decision) (err error) {
		if s.master == nil {
			return failure.New(failure.State, errNoMaster, "its KMS is not the cluster KMS")
		}
		resp.CorrelationId = d.entry.CorrelationID
		if resp.SealedMaster, err = d.caller.channel.Seal(replica.SealInfo, s.master); err != nil {
			return err
		}
		return s.audit.Append(*d.entry)
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// Seen implements the service. An exchange is in the audit log only if it is refused.
func (s *replicas) Seen(ctx context.Context, r *replicav1.SeenRequest) (*replicav1.SeenResponse, error) {
	var resp *replicav1.SeenResponse
	err := s.decide(ctx, ask{event: "replica-seen", replica: true}, func(d *decision) error {
		page, err := replica.ParsePage(r.GetPage())
		if err == nil && r.GetEpoch() > replica.MaxEpoch {
			err = fmt.Errorf("epoch %d", r.GetEpoch())
		}
		if err != nil {
			return failure.New(failure.Usage, err, "")
		}
		key, err := s.RecordKey()
		if err != nil {
			return err
		}
		if r.GetRecordKey() != key {
			return failure.New(failure.State, errOtherRecord, "do both have the same storage?")
		}
		if err := s.Note(ctx, d.entry.Identity, r.GetEpoch(), page); err != nil {
			return err
		}
		ours := s.Since(r.GetAfter())
		resp = &replicav1.SeenResponse{Epoch: ours.Epoch, Page: replica.EncodePage(ours.Volumes), Position: ours.Next, More: ours.More}
		return nil
	})
	return resp, err
}

// Since implements replica.Book.
func (s *Service) Since(position uint64) volume.Seen {
	return s.volumes.SeenSince(position, replica.PageSize)
}

// Note implements replica.Book. A storage that shows less than what another key service has seen
// went back. What was seen before an operator gave up all records does not count; that word goes
// from one to the other.
func (s *Service) Note(ctx context.Context, from string, epoch uint64, page []volume.Sighting) error {
	if err := s.epochs.begin(epoch, func() {
		s.log.WarnContext(ctx, "an operator gave up all records, by a replica's word: what was seen before is forgotten", "identity", from, "epoch", epoch)
	}, audit.Entry{Identity: from, Detail: "by the word of a replica"}); err != nil {
		return err
	}
	if left := s.volumes.NoteSeen(epoch, page); left > 0 {
		s.log.WarnContext(ctx, "a replica has seen more volumes than there is room for", "identity", from, "left_out", left, "most", volume.MaxSeen)
	}
	return nil
}
