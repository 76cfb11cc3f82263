package keyservice

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"time"

	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/revocation"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms/setup"
	"github.com/keyagent/keyagent/storage"
)

// history is what an audit log says of records.
type history struct {
	seen      map[string]uint64 // revision by volume
	words     []revocation.Word
	recovered map[string]time.Time // requests that were answered, by nonce
	recordKey string
	wentBack  string // what a node has shown of this log
	epoch     uint64 // when all records were given up the last time
	epochMAC  string
}

// initRecords is the event after which nothing is known of the volumes before it.
const initRecords = "init-records"

func (h *history) note(e audit.Entry) {
	switch {
	case e.Result != "allowed":
	case e.Event == initRecords && e.MAC == "":
		h.seen = map[string]uint64{} // an operator's word for this log
	case e.Event == initRecords && e.Revision > h.epoch:
		h.seen, h.epoch, h.epochMAC = map[string]uint64{}, e.Revision, e.MAC
	case e.Event == initRecords: // two replicas told it at once
	case e.Volume != "" && e.Revision > 0:
		h.seen[e.Volume] = max(h.seen[e.Volume], e.Revision)
	}
	if s, err := revocation.ParseSubject(e.Subject); err == nil && e.Result == "allowed" && e.Word > 0 {
		h.words = append(h.words, revocation.Word{Subject: s, Number: e.Word, Revoked: e.Event == revokeEvent, ID: e.CorrelationID, By: e.Identity, Reason: e.Detail, At: e.Time})
	}
	if nonce, ok := strings.CutPrefix(e.Subject, recoverySubject); ok && e.Event == recoverEvent && e.Result == "allowed" {
		h.recovered[nonce] = e.Time
	}
	if e.Event == wentBackEvent {
		h.wentBack = e.Detail
	}
	if e.RecordKey != "" {
		h.recordKey = e.RecordKey
	}
}

func (s *Server) openService(ctx context.Context) error {
	if err := s.keepMaster(ctx); err != nil {
		return err
	}
	k, err := s.openKMS(ctx)
	if err != nil {
		return err
	}
	st, err := setup.Storage(ctx, s.cfg.Storage)
	if err != nil {
		return BackendError(fmt.Errorf("storage: %w", err))
	}
	s.closers = append(s.closers, st)
	alone, err := claim(st)
	if err != nil {
		return err
	}
	h := &history{seen: map[string]uint64{}, recovered: map[string]time.Time{}}
	log, err := audit.Open(s.cfg.Audit, time.Now, h.note)
	if err != nil {
		return auditError(err)
	}
	s.closers = append(s.closers, log)
	if n := log.Recovered(); n > 0 {
		s.log.Warn("cut off an unfinished audit entry, as a crash leaves it", "bytes", n)
	}
	if err := s.checkStart(ctx, st, log, h); err != nil {
		return err
	}
	known := h.recordKey
	if s.cfg.RecordKey != "" {
		known = s.cfg.RecordKey
	}
	s.service, err = New(ctx, Options{
		Policy: s.policy, KMS: k, Storage: observeStorage(st, s.cfg.Storage, s.metrics), Audit: log, Log: s.log, Metrics: s.metrics,
		Seen: h.seen, Words: h.words, Recovery: s.cfg.Recovery, Recovered: h.recovered, RecordKey: known, RecordKeyPinned: s.cfg.RecordKey != "", Alone: alone,
		Master: s.master, Joined: s.joined, InitRecords: s.cfg.InitRecords, Epoch: h.epoch, EpochMAC: h.epochMAC,
	})
	if err != nil {
		return forOperator(err)
	}
	s.closers = append(s.closers, s.service)
	secret.Forget() // the master secret was read, and keys were derived from it
	id, err := s.service.RecordKey()
	if err != nil || id == h.recordKey || s.service.records.Created() {
		return err // the log knows it
	}
	return log.Append(audit.Entry{Event: "record-key", RecordKey: id, Result: "allowed"})
}

// claim makes sure that a storage which is for one key service has one.
func claim(st setup.Objects) (alone bool, err error) {
	one, ok := st.(interface{ Alone() error })
	if !ok {
		return false, nil
	}
	if err := one.Alone(); err != nil {
		return false, failure.New(failure.Configuration, fmt.Errorf("storage: %w", err), "")
	}
	return true, nil
}

// checkStart refuses to begin with one half of what a key service has written. An
// audit log that is gone would take with it all that is known against a storage that
// goes back; records that are gone, as those of a folder that is not mounted, would be
// made anew in the wrong place.
func (s *Server) checkStart(ctx context.Context, st storage.Storage, log *audit.Log, h *history) error {
	if h.wentBack != "" {
		return failure.New(failure.Tampered, fmt.Errorf("audit log: %w: %s", errWentBack, h.wentBack), wentBackHint)
	}
	records := false
	for _, c := range macstore.Collections {
		names, err := st.List(ctx, c.Prefix, "", 1)
		if err != nil {
			return forOperator(fmt.Errorf("storage: %w", err))
		}
		records = records || len(names) > 0
	}
	emptyLog := log.Head().Entries == 0
	switch {
	case emptyLog && records && !s.cfg.InitAudit:
		return failure.Newf(failure.Tampered, "put the audit log back; or, if it is lost or this key service is a new one over a shared storage, start once with --init-audit",
			"the audit log %s is empty, and there are records", s.cfg.Audit)
	case !emptyLog && s.cfg.InitAudit:
		return failure.Newf(failure.Configuration, "leave it out: it is for one start", "--init-audit, and the audit log is not empty")
	case len(h.seen) > 0 && !records && !s.cfg.InitRecords:
		return failure.Newf(failure.Tampered, "is the storage the right one, and mounted? Put the records back, or start once with --init-records: then every volume begins anew",
			"there are no records, and the audit log knows %d volumes", len(h.seen))
	case records && s.cfg.InitRecords:
		return failure.Newf(failure.Configuration, "leave it out: it is for one start", "--init-records, and there are records")
	}
	for _, init := range []struct {
		event string
		said  bool
	}{{"init-audit", s.cfg.InitAudit}, {initRecords, s.cfg.InitRecords}} {
		if !init.said {
			continue
		}
		s.log.Warn("beginning anew by an operator's word", "event", init.event, "volumes", len(h.seen))
		entry := audit.Entry{Event: init.event, Result: "allowed", Detail: fmt.Sprintf("%d volumes were known", len(h.seen))}
		if err := log.Append(entry); err != nil {
			return auditError(err)
		}
		h.note(entry)
	}
	return nil
}

func auditError(err error) error {
	class, hint := failure.Configuration, ""
	switch {
	case errors.Is(err, audit.ErrBroken):
		class, hint = failure.Tampered, "keyagent audit verify says where; nothing is served until it is whole"
	case errors.Is(err, fs.ErrNotExist):
		hint = "make its folder"
	case errors.Is(err, syscall.EWOULDBLOCK):
		hint = "is another keyagent serve running?"
	}
	return failure.New(class, fmt.Errorf("audit log: %w", err), hint)
}
