package keyservice

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/recovery"
	"github.com/keyagent/keyagent/internal/shares"
	"github.com/keyagent/keyagent/internal/volume"
	"github.com/keyagent/keyagent/kms"
)

// RecoveryConfig is who may approve that a person gets a volume's key.
type RecoveryConfig struct {
	Threshold int                 `yaml:"threshold"`
	Operators []recovery.Operator `yaml:"operators"`
	PerDay    int                 `yaml:"per_day,omitempty"` // keys in 24 hours; 0: 3
}

const (
	defaultPerDay   = 3
	recoverEvent    = "recover"
	requestEvent    = "recover-request"
	recoverySubject = "recovery:" // and the nonce, in the audit log
)

var (
	errNoRecovery = errors.New("recovery is off")
	errUsed       = errors.New("the request was answered")
	errTooOften   = errors.New("too many keys were recovered in 24 hours")
)

// recoveries is what was recovered, by the audit log and since.
type recoveries struct {
	board  *recovery.Board
	perDay int

	mu   sync.Mutex
	used map[string]time.Time // by nonce
}

// newRecoveries is nil without a configuration: nobody recovers anything.
func newRecoveries(c *RecoveryConfig, used map[string]time.Time) (*recoveries, error) {
	if c == nil {
		return nil, nil
	}
	board, err := recovery.NewBoard(c.Threshold, c.Operators)
	if err != nil {
		return nil, failure.New(failure.Configuration, fmt.Errorf("recovery: %w", err), "")
	}
	r := &recoveries{board: board, perDay: c.PerDay, used: map[string]time.Time{}}
	if r.perDay == 0 {
		r.perDay = defaultPerDay
	}
	for nonce, at := range used {
		r.used[nonce] = at
	}
	return r, nil
}

// take uses a request up. It stays used whatever comes after.
func (r *recoveries) take(nonce string, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.used[nonce]; ok {
		return errUsed
	}
	recent := 0
	for _, at := range r.used {
		if now.Sub(at) < 24*time.Hour {
			recent++
		}
	}
	if recent >= r.perDay {
		return fmt.Errorf("%w: %d", errTooOften, recent)
	}
	r.used[nonce] = now
	return nil
}

// RecoverRequest makes a request for the key of a volume, which gives nothing by itself.
//
// version is that of the key, 0 for the one in use. While a volume's key is being changed, the disk
// may need the other one.
func (s *Service) RecoverRequest(ctx context.Context, who, id, reason, recipient string, version uint32, window time.Duration) ([]byte, error) {
	var data []byte
	_, err := s.operate(ctx, requestEvent, who, id, func(e *audit.Entry) (*volume.Record, error) {
		e.Detail = reason
		if s.recovery == nil {
			return nil, errNoRecovery
		}
		rec, err := s.holding(ctx, id)
		if err != nil {
			return nil, err
		}
		version = cmp.Or(version, rec.KeyVersion)
		if _, _, err := keyOf(rec, version); err != nil {
			return nil, err
		}
		service, err := s.RecordKey()
		if err != nil {
			return nil, err
		}
		r, err := recovery.New(recovery.Request{
			Service: service, Volume: id, Generation: rec.Generation, KeyVersion: version, Reason: reason, Recipient: recipient, From: s.now(), Until: s.now().Add(window),
		})
		if err != nil {
			return nil, err
		}
		e.Subject = recoverySubject + r.Nonce
		data, err = r.Encode()
		return rec, err
	})
	return data, err
}

// keyOf is a key that the record has: the one in use, or the one that is to be.
func keyOf(rec *volume.Record, version uint32) (kms.Binding, kms.Wrapped, error) {
	b, w, err := rec.Binding()
	if err == nil && b.Version != version && rec.State == volume.Rotating {
		var next *volume.Record
		if next, err = rec.Next(); err == nil {
			b, w, err = next.Binding()
		}
	}
	if err == nil && b.Version != version {
		err = fmt.Errorf("%w: the volume's key has version %d", volume.ErrTransition, rec.KeyVersion)
	}
	return b, w, err
}

// holding is the record of a volume that holds data, and whose key is not revoked.
func (s *Service) holding(ctx context.Context, id string) (*volume.Record, error) {
	if err := s.mustNotBeRevoked(ctx, nil, id); err != nil {
		return nil, err
	}
	rec, err := s.volumes.Get(ctx, id)
	switch {
	case err != nil:
		return nil, err
	case rec.State == volume.Retired:
		return nil, fmt.Errorf("%w: %q", volume.ErrRetired, id)
	case !rec.State.HoldsData():
		return nil, fmt.Errorf("%w: it is %s", volume.ErrNotActive, rec.State)
	}
	return rec, nil
}

// Recover gives the key of a volume to the recipient of a request, once enough operators have
// approved it: encrypted to that one. The audit log has it before anything leaves.
func (s *Service) Recover(ctx context.Context, who string, request []byte, approvals [][]byte) ([]byte, error) {
	r, err := recovery.Parse(request)
	if err != nil {
		return nil, forOperator(err)
	}
	var out []byte
	_, err = s.operate(ctx, recoverEvent, who, r.Volume, func(e *audit.Entry) (*volume.Record, error) {
		e.Detail = r.Reason
		if s.recovery == nil {
			return nil, errNoRecovery
		}
		service, err := s.RecordKey()
		if err != nil {
			return nil, err
		}
		if r.Service != service {
			return nil, fmt.Errorf("%w: it is for another key service", recovery.ErrRequest)
		}
		if err := r.At(s.now()); err != nil {
			return nil, err
		}
		names, err := s.recovery.board.Approved(request, approvals)
		if err != nil {
			return nil, err
		}
		rec, err := s.holding(ctx, r.Volume)
		if err != nil {
			return nil, err
		}
		if rec.Generation != r.Generation {
			return nil, fmt.Errorf("%w: the volume has generation %d since", volume.ErrTransition, rec.Generation)
		}
		// All that can fail comes first: a request is used up once.
		out, err = s.keyFor(ctx, rec, r)
		if err != nil {
			return nil, err
		}
		if err := s.recovery.take(r.Nonce, s.now()); err != nil {
			return nil, err
		}
		entry := *e
		entry.Subject, entry.Holder, entry.KeyVersion, entry.Revision = recoverySubject+r.Nonce, strings.Join(names, ", "), r.KeyVersion, rec.Revision
		if err := s.audit.Append(entry); err != nil {
			return nil, err
		}
		e.Event, e.Subject, e.Holder = recoverEvent+"-done", entry.Subject, entry.Holder
		return rec, nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// keyFor encrypts a key of a volume to a person. Nothing leaves.
func (s *Service) keyFor(ctx context.Context, rec *volume.Record, r recovery.Request) ([]byte, error) {
	to, err := shares.ParsePlainRecipient(r.Recipient)
	if err != nil {
		return nil, err
	}
	b, w, err := keyOf(rec, r.KeyVersion)
	if err != nil {
		return nil, err
	}
	dek, err := s.kms.Unwrap(ctx, b, w)
	if err != nil {
		return nil, err
	}
	defer dek.Close()
	return shares.EncryptTo(to, dek)
}
