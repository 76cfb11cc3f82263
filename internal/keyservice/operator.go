package keyservice

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/volume"
	"github.com/keyagent/keyagent/kms"
)

// VolumeInfo is what an operator sees of a volume.
type VolumeInfo struct {
	Volume     string           `json:"volume"`
	State      volume.State     `json:"state,omitempty"`
	Revision   uint64           `json:"revision,omitempty"`
	Seen       uint64           `json:"seen,omitempty"` // if that is higher: storage went back
	Generation uint64           `json:"generation,omitempty"`
	Owner      string           `json:"owner,omitempty"`
	LUKSUUID   string           `json:"luks_uuid,omitempty"`
	KeyVersion uint32           `json:"key_version,omitempty"`
	KEK        string           `json:"kek,omitempty"`
	HeaderMAC  string           `json:"header_mac,omitempty"`
	CopyMACs   []string         `json:"copy_macs,omitempty"`
	Attempt    *volume.Attempt  `json:"attempt,omitempty"`
	Lease      *volume.Lease    `json:"lease,omitempty"`
	Ends       *time.Time       `json:"lease_ends,omitempty"` // as this key service knows it
	Rotation   *volume.Rotation `json:"rotation,omitempty"`   // of the key, under way
	Rotate     *volume.Wish     `json:"rotate,omitempty"`
	Diskless   bool             `json:"diskless,omitempty"` // its key opens no disk
	Created    *time.Time       `json:"created,omitempty"`
	Updated    *time.Time       `json:"updated,omitempty"`
	Kept       string           `json:"kept,omitempty"`    // why earlier states of a retired record may still be had
	Refused    string           `json:"refused,omitempty"` // why it is no record
}

func (s *Service) info(r *volume.Record) VolumeInfo {
	i := VolumeInfo{Volume: r.VolumeID, State: r.State, Revision: r.Revision, Generation: r.Generation, Owner: r.Owner, LUKSUUID: r.LUKSUUID,
		KeyVersion: r.KeyVersion, HeaderMAC: r.HeaderMAC, CopyMACs: r.CopyMACs, Attempt: r.Attempt, Lease: r.Lease, Rotation: r.Rotation, Rotate: r.Rotate, Diskless: r.Diskless(), Created: &r.Created, Updated: &r.Updated}
	if seen := s.volumes.Seen(r.VolumeID); seen > r.Revision {
		i.Seen = seen
	}
	if _, w, err := r.Binding(); err == nil {
		i.KEK = w.KEK
	}
	if r.Lease != nil {
		ends := s.volumes.Ends(r).UTC()
		i.Ends = &ends
	}
	return i
}

// look is info of whatever storage has.
func (s *Service) look(ctx context.Context, id string) (VolumeInfo, error) {
	r, err := s.volumes.Peek(ctx, id)
	seen := s.volumes.Seen(id)
	switch {
	case err == nil:
		return s.info(r), nil
	case macstore.Foreign(err):
		return VolumeInfo{Volume: id, Seen: seen, Refused: err.Error()}, nil
	case isAbsent(err) && seen > 0:
		return VolumeInfo{Volume: id, Seen: seen, Refused: "its record is gone"}, nil
	}
	return VolumeInfo{}, err
}

// Volumes returns what is known of at most limit volumes that come after one, in byte
// order. A record that is damaged is one of them.
func (s *Service) Volumes(ctx context.Context, after string, limit int) ([]VolumeInfo, error) {
	ids, err := s.records.List(ctx, macstore.Volume, after, limit)
	if err != nil {
		return nil, forOperator(err)
	}
	all := []VolumeInfo{}
	for _, id := range ids {
		i, err := s.look(ctx, id)
		if isAbsent(err) {
			continue // deleted since it was listed
		}
		if err != nil {
			return nil, forOperator(err)
		}
		all = append(all, i)
	}
	return all, nil
}

// Volume returns what is known of one.
func (s *Service) Volume(ctx context.Context, id string) (VolumeInfo, error) {
	i, err := s.look(ctx, id)
	return i, forOperator(err)
}

// operate changes a volume by an operator's word, and writes that down.
func (s *Service) operate(ctx context.Context, event, who, id string, f func(e *audit.Entry) (*volume.Record, error)) (VolumeInfo, error) {
	e := audit.Entry{Event: event, CorrelationID: newID(), Identity: who, Volume: id, Result: "allowed"}
	var r *volume.Record
	err := failure.Newf(failure.Usage, "", "%.64q is not a volume ID", id)
	if policy.ValidVolume(id) {
		r, err = f(&e)
		err = forOperator(err)
	} else {
		e.Volume = fmt.Sprintf("%.64q", id)
	}
	if err != nil {
		e.Result, e.Class, e.Detail = "refused", string(failure.Of(err).Class), err.Error()
		s.log.WarnContext(ctx, "refused to an operator", "event", e.Event, "who", who, "volume", e.Volume, "error", err)
		return VolumeInfo{}, errors.Join(failure.WithID(err, e.CorrelationID), s.audit.Append(e))
	}
	e.Revision, e.KeyVersion = r.Revision, r.KeyVersion
	s.log.InfoContext(ctx, "by an operator's word", "event", e.Event, "who", who, "volume", id, "detail", e.Detail, "revision", r.Revision)
	s.forget.used()
	return s.info(r), s.audit.Append(e)
}

func (s *Service) existing(ctx context.Context, id string, f func(*volume.Record) error) (*volume.Record, error) {
	return s.volumes.Update(ctx, id, func(r *volume.Record) error {
		if r.State == volume.Absent {
			return volume.ErrNoVolume
		}
		return f(r)
	})
}

// Retire ends the life of a volume, and destroys its wrapped keys: in its record, and in the
// earlier states of it that storage keeps. What is left of those is in Kept. Repeating it
// tries those again.
func (s *Service) Retire(ctx context.Context, who, id string) (VolumeInfo, error) {
	kept := ""
	i, err := s.operate(ctx, "volume-retire", who, id, func(e *audit.Entry) (*volume.Record, error) {
		r, err := s.existing(ctx, id, (*volume.Record).Retire)
		if err == nil {
			kept = s.purge(ctx, e, id)
		}
		return r, err
	})
	i.Kept = kept
	return i, err
}

// purge destroys the earlier states of a retired volume's record, and says what is left. The
// volume is retired in any case.
func (s *Service) purge(ctx context.Context, e *audit.Entry, id string) (kept string) {
	n, err := s.volumes.Purge(ctx, id)
	e.Detail = fmt.Sprintf("%d earlier versions of the record were destroyed", n)
	if err != nil {
		kept = BackendError(err).Error()
		e.Detail += ", and some may be kept: " + kept
		s.log.WarnContext(ctx, "storage may keep the key of a retired volume", "volume", id, "error", err)
	}
	return kept
}

// Reset begins a new life of a volume on another disk, with another key.
func (s *Service) Reset(ctx context.Context, who, id string) (VolumeInfo, error) {
	return s.operate(ctx, "volume-reset", who, id, func(e *audit.Entry) (*volume.Record, error) {
		before, err := s.volumes.Get(ctx, id)
		if err != nil {
			return nil, err
		}
		key, err := s.volumes.NewKey(ctx, before.NextKey())
		if err != nil {
			return nil, err
		}
		e.Detail = fmt.Sprintf("it was %s, generation %d", before.State, before.Generation)
		return s.existing(ctx, id, func(r *volume.Record) error {
			if r.Generation != before.Generation {
				return fmt.Errorf("%w: somebody else reset it", volume.ErrTransition)
			}
			if key.Version != r.NextKey().Version {
				return fmt.Errorf("%w: its key was being changed meanwhile", volume.ErrTransition)
			}
			return r.Reset(key)
		})
	})
}

// Takeover ends whatever lease or attempt a volume has.
func (s *Service) Takeover(ctx context.Context, who, id string) (VolumeInfo, error) {
	return s.operate(ctx, "volume-takeover", who, id, func(e *audit.Entry) (*volume.Record, error) {
		return s.existing(ctx, id, func(r *volume.Record) error {
			h, held := r.End()
			if !held {
				return failure.Newf(failure.State, "", "nobody holds volume %q", id)
			}
			e.Holder = h.String()
			return nil
		})
	})
}

// Restored lists the volumes that storage shows in an older state than was seen.
func (s *Service) Restored(ctx context.Context) ([]volume.Restored, error) {
	all, err := s.volumes.Restored(ctx)
	if all == nil {
		all = []volume.Restored{}
	}
	return all, forOperator(err)
}

// AcceptRestore makes the older record of a volume the one that counts.
func (s *Service) AcceptRestore(ctx context.Context, who, id string) (VolumeInfo, error) {
	return s.operate(ctx, "volume-accept-restore", who, id, func(e *audit.Entry) (*volume.Record, error) {
		found, err := s.volumes.Peek(ctx, id)
		if err != nil {
			return nil, err
		}
		r, seen, err := s.volumes.Accept(ctx, id)
		e.Detail = fmt.Sprintf("from revision %d back to %d, %s", seen, found.Revision, found.State)
		return r, err
	})
}

// Lost is what is known of a volume whose record is lost: the header's backup has it.
type Lost struct {
	Volume     string   `json:"volume"`
	Owner      string   `json:"owner"` // the grant
	LUKSUUID   string   `json:"luks_uuid"`
	Generation uint64   `json:"generation"`
	KeyVersion uint32   `json:"key_version"`
	HeaderMAC  string   `json:"header_mac"`
	CopyMACs   []string `json:"copy_macs,omitempty"`
}

// ImportLost makes the record of a volume anew whose key the KMS derives.
func (s *Service) ImportLost(ctx context.Context, who string, l Lost) (VolumeInfo, error) {
	return s.operate(ctx, "volume-import", who, l.Volume, func(e *audit.Entry) (*volume.Record, error) {
		key, err := s.volumes.KeyOf(ctx, kms.Binding{VolumeID: l.Volume, Purpose: kms.VolumeDEK, Version: l.KeyVersion, Length: volume.DEKLength})
		if err != nil {
			return nil, err
		}
		if len(key.Wrapped.Blob) != 0 {
			return nil, failure.Newf(failure.State, "import it from an export: keyagent kms import", "this KMS derives no keys: the key of volume %q is lost with its record", l.Volume)
		}
		if mac, err := hex.DecodeString(l.HeaderMAC); err != nil || len(mac) != 32 {
			return nil, failure.Newf(failure.Usage, "keyagent backup-header writes it", "the header's MAC has 64 hex digits")
		}
		e.Detail = fmt.Sprintf("generation %d, header MAC %s", l.Generation, l.HeaderMAC)
		return s.volumes.Import(ctx, &volume.Record{VolumeID: l.Volume, State: volume.Active, Generation: l.Generation, Owner: l.Owner,
			LUKSUUID: l.LUKSUUID, KeyVersion: l.KeyVersion, Keys: []volume.WrappedDEK{key}, HeaderMAC: l.HeaderMAC, CopyMACs: l.CopyMACs})
	})
}

// Admin is what an operator does with all records at once.
func (s *Service) Admin() *Admin { return &Admin{kms: s.kms, records: s.records, now: s.now} }
