package keyservice

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"strings"
	"sync"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/checkpoint"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/secret"
)

// wentBackEvent is in the log from the moment on at which a node showed that the log was put
// back. A key service does not start over such a log.
const wentBackEvent = "log-went-back"

// maxNotes bounds the checkpoints in one request.
const maxNotes = 8

var errWentBack = errors.New("this key service's audit log was put back to an older state, and its records may have been")

// wentBack is what a node has shown. The node may know: it has half of it.
type wentBack struct{ seen, shows string }

func (e *wentBack) Error() string {
	return fmt.Sprintf("%v: a node has seen %s, and it has %s", errWentBack, e.seen, e.shows)
}
func (e *wentBack) Unwrap() error      { return errWentBack }
func (e *wentBack) PeerDetail() string { return e.Error() }

const wentBackHint = "runbook, \"A node says that the audit log went back\""

// logbook is the audit log as the nodes know it: each keeps the checkpoint that came with its
// last key, and shows it when it comes back.
type logbook struct {
	log  *audit.Log
	seed *secret.Bytes

	mu     sync.Mutex
	signer *checkpoint.Signer // once the log has an entry
	latest *checkpoint.Signed
	back   error // what a node has shown
}

// checkpointKey is what the key that signs checkpoints is derived for. Replicas have the same
// key, each for a log of its own.
const checkpointKey = "keyagent audit checkpoint key v1"

func newLogbook(records *macstore.Store, log *audit.Log) (*logbook, error) {
	seed, err := records.Derive(checkpointKey, ed25519.SeedSize)
	return &logbook{log: log, seed: seed}, err
}

// Close wipes the key.
func (b *logbook) Close() error { return b.seed.Close() }

// err is why no key may be released, or nil.
func (b *logbook) err() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.back
}

// ready makes the signer once there is an entry. The lock is held.
func (b *logbook) ready() error {
	first, ok := b.log.First()
	if b.signer != nil || !ok {
		return nil
	}
	var err error
	b.signer, err = checkpoint.NewSigner(b.seed, first)
	return err
}

// now is the checkpoint of what is on the disk. There is an entry.
func (b *logbook) now() (*checkpoint.Signed, ed25519.PublicKey, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.ready(); err != nil {
		return nil, nil, err
	}
	size := b.log.Size()
	if b.latest == nil || b.latest.Size != size {
		root, err := b.log.Root(size)
		if err != nil {
			return nil, nil, err
		}
		if b.latest, err = b.signer.Sign(size, root); err != nil {
			return nil, nil, err
		}
	}
	return b.latest, b.signer.Public(), nil
}

// hear looks at the checkpoints that a node keeps, and returns the one of this log, or nil.
// Those of other replicas' logs say nothing here. The error says that this log is not what it
// was, which only who has the log's key can make true.
func (b *logbook) hear(notes [][]byte) (own *checkpoint.Signed, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.ready(); err != nil || b.signer == nil {
		return nil, err
	}
	for _, data := range notes {
		if !strings.HasPrefix(string(data[:min(len(data), checkpoint.MaxNote)]), b.signer.Log().Origin()+"\n") {
			continue
		}
		seen, err := checkpoint.Parse(b.signer.Public(), data)
		if err != nil {
			continue // anybody can write one
		}
		size := b.log.Size()
		if seen.Size > size {
			return nil, &wentBack{seen.String(), fmt.Sprintf("%d entries", size)}
		}
		root, err := b.log.Root(seen.Size)
		if err != nil {
			return nil, err
		}
		if root != seen.Root {
			return nil, &wentBack{seen.String(), fmt.Sprintf("the root %s over those", root)}
		}
		if own == nil {
			own = seen
		}
	}
	return own, nil
}

// witness takes what a node has seen of the log. Once that shows that the log went back nobody
// gets a key any more.
func (s *Service) witness(ctx context.Context, e *audit.Entry, notes [][]byte) (*checkpoint.Signed, error) {
	if len(notes) > maxNotes {
		return nil, failure.Newf(failure.Usage, "", "%d checkpoints in one request", len(notes))
	}
	own, err := s.book.hear(notes)
	if !errors.Is(err, errWentBack) {
		return own, err
	}
	s.book.mu.Lock()
	again := s.book.back != nil
	if !again {
		s.book.back = err
	}
	s.book.mu.Unlock()
	if again {
		return nil, err
	}
	s.log.ErrorContext(ctx, "THE AUDIT LOG WENT BACK: no key is released any more", "error", err, "identity", e.Identity, "correlation_id", e.CorrelationID)
	return nil, errors.Join(err, s.audit.Append(audit.Entry{
		Event: wentBackEvent, CorrelationID: e.CorrelationID, Identity: e.Identity, Result: "refused", Class: string(failure.Tampered), Detail: err.Error(),
	}))
}

// addCheckpoint puts what the log is now into an answer whose entry it has.
func (s *Service) addCheckpoint(resp *keyservicev1.GetKeyResponse, seen *checkpoint.Signed) error {
	c, key, err := s.book.now()
	if err != nil {
		return err
	}
	resp.Checkpoint, resp.CheckpointKey = c.Note, key
	if seen != nil {
		resp.Consistency, err = s.audit.Consistency(seen.Size, c.Size)
	}
	return err
}

// Checkpoint is what the audit log is now, for keeping it elsewhere.
type Checkpoint struct {
	Note string `json:"note"`
	Key  string `json:"key"` // as tools that read signed notes want it
}

// Checkpoint signs what the audit log is now.
func (s *Service) Checkpoint() (Checkpoint, error) {
	c, key, err := s.book.now()
	if err != nil {
		return Checkpoint{}, err
	}
	vkey, err := checkpoint.VerifierKey(c.Log, key)
	return Checkpoint{string(c.Note), vkey}, err
}
