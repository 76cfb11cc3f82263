package keyservice

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/revocation"
)

var errRevoked = errors.New("revoked by an operator")

// The events of the audit log.
const (
	revokeEvent = "revoke"
	liftEvent   = "lift-revocation"
)

// mustNotBeRevoked refuses a machine and a volume that an operator revoked by name, whatever
// the policy says.
func (s *Service) mustNotBeRevoked(ctx context.Context, identities []string, volume string) error {
	subjects := []revocation.Subject{{Kind: revocation.Volume, Name: volume}}
	for _, id := range identities {
		subjects = append(subjects, revocation.Subject{Kind: revocation.Node, Name: id})
	}
	w := s.revoked.Revoked(ctx, subjects...)
	if w == nil {
		return nil
	}
	return fmt.Errorf("%w: %s, by %s at %s: %s", errRevoked, w.Subject, w.By, w.At.Format("2006-01-02T15:04:05Z"), w.Reason)
}

// Revoke has a machine, or a volume, get no keys any more, and open volumes be suspended at
// their next renewal. With lift it takes that back.
func (s *Service) Revoke(ctx context.Context, who string, subject revocation.Subject, reason string, lift bool) (revocation.Word, error) {
	e := audit.Entry{Event: revokeEvent, CorrelationID: newID(), Identity: who, Result: "allowed", Detail: reason}
	if lift {
		e.Event = liftEvent
	}
	w, err := s.revoked.Say(ctx, revocation.Word{Subject: subject, Revoked: !lift, ID: e.CorrelationID, By: who, Reason: reason}, func(w revocation.Word) error {
		e.Event, e.Detail = liftEvent, w.Reason
		if w.Revoked {
			e.Event = revokeEvent
		}
		e.Subject, e.Word = subject.String(), w.Number
		s.log.WarnContext(ctx, "by an operator's word", "event", e.Event, "who", who, "subject", e.Subject, "reason", reason)
		return s.audit.Append(e)
	})
	if err == nil {
		return w, nil
	}
	err = failure.WithID(forOperator(err), e.CorrelationID)
	if e.Word > 0 {
		return w, err // the log has it, or takes nothing
	}
	e.Subject = fmt.Sprintf("%.80q", subject)
	e.Result, e.Class, e.Detail = "refused", string(failure.Of(err).Class), err.Error()
	return w, errors.Join(err, s.audit.Append(e))
}

// Revocations returns what is revoked.
func (s *Service) Revocations(ctx context.Context) ([]revocation.Word, error) {
	all, err := s.revoked.All(ctx)
	return all, forOperator(err)
}
