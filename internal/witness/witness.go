// Package witness is a node's memory of what its key service's audit logs were: the last
// checkpoint of each, which came with a key. A key service whose log was put back to an older
// state, and its records with it, cannot show a log that continues it.
//
// A key service may have replicas, each with a log of its own. A log that this node has not
// seen is taken, and said aloud.
package witness

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/keyagent/keyagent/internal/checkpoint"
	"github.com/keyagent/keyagent/internal/failure"
)

// Memory keeps a few hundred bytes. It need not be safe for concurrent use.
type Memory interface {
	// Load returns what was stored, or nothing.
	Load() ([]byte, error)
	// Store replaces it. It keeps what there was if it fails.
	Store([]byte) error
}

// MaxLogs bounds how many logs are remembered: those that were used last.
const MaxLogs = 5

// Size is what a [Memory] has room for, in bytes. It fits the NV indices of hardware TPMs.
const Size = 2 + MaxLogs*entrySize

// An entry is a log's key, its ID, size and root, and the signature of the note.
const (
	entrySize = ed25519.PublicKeySize + 16 + 8 + 32 + ed25519.SignatureSize
	version   = 1
)

// Options configure [New].
type Options struct {
	Memory Memory // nil: this process's own
	// Every is the least time between two writes, for a memory that wears: what comes meanwhile
	// is written then, or when the witness is closed. Zero: each checkpoint is written.
	Every time.Duration
	Log   *slog.Logger     // default none
	Now   func() time.Time // default time.Now, whose readings the host cannot set back
	// After calls f after a while, unless it is stopped. Default time.AfterFunc.
	After func(d time.Duration, f func()) (stop func() bool)
}

// Witness remembers. It is safe for concurrent use.
type Witness struct {
	opts Options

	mu     sync.Mutex
	loaded bool
	logs   []Log // the one that was used last comes first
	stored time.Time
	dirty  bool
	stop   func() bool // of the write that is to come, or nil
}

// Log is what is known of one audit log.
type Log struct {
	Key  ed25519.PublicKey
	Last *checkpoint.Signed
}

// New returns a witness that reads its memory when it is first asked.
func New(opts Options) *Witness {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.After == nil {
		opts.After = func(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	return &Witness{opts: opts}
}

// Logs returns what is remembered.
func (w *Witness) Logs() []Log {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.load()
	return slices.Clone(w.logs)
}

// load reads the memory once. What cannot be read now may be readable later: a TPM is in use
// by somebody else, or its driver is late. The lock is held.
func (w *Witness) load() {
	if w.loaded || w.opts.Memory == nil {
		w.loaded = true
		return
	}
	data, err := w.opts.Memory.Load()
	if err != nil {
		w.opts.Log.Warn("what was seen of the key service's audit log cannot be read", "error", err)
		return
	}
	w.loaded = true
	logs, err := decode(data)
	if err != nil {
		w.opts.Log.Warn("what was seen of the key service's audit log is damaged", "error", err)
	}
	// Another process may have seen more.
	for _, l := range logs {
		switch i := w.index(l.Last.Log); {
		case i < 0 && len(w.logs) < MaxLogs:
			w.logs = append(w.logs, l)
		case i >= 0 && w.logs[i].Last.Size < l.Last.Size:
			w.logs[i] = l
		}
	}
}

func (w *Witness) index(log checkpoint.ID) int {
	return slices.IndexFunc(w.logs, func(l Log) bool { return l.Last.Log == log })
}

// Close writes what the memory does not have yet.
func (w *Witness) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stop != nil {
		w.stop()
		w.stop = nil
	}
	if !w.dirty {
		return nil
	}
	return w.store()
}

// store writes what is remembered, and what another process wrote meanwhile. The lock is held.
func (w *Witness) store() error {
	w.dirty = false
	if w.opts.Memory == nil {
		return nil
	}
	w.loaded = false
	if w.load(); !w.loaded {
		w.dirty = true // not over what could not be read
		return nil
	}
	w.stored = w.opts.Now()
	return w.opts.Memory.Store(encode(w.logs))
}

// Answer is what a key service says of its log.
type Answer struct {
	Key         ed25519.PublicKey
	Note        []byte
	Consistency [][]byte
}

// Asked is what was known when a key service was asked, which its proof begins at.
type Asked struct {
	w    *Witness
	logs []Log
}

// Ask begins a request.
func (w *Witness) Ask() *Asked { return &Asked{w, w.Logs()} }

// Notes are to be sent with the request.
func (a *Asked) Notes() [][]byte {
	out := make([][]byte, len(a.logs))
	for i, l := range a.logs {
		out[i] = l.Last.Note
	}
	return out
}

// Hear takes the answer. An error of class tampered says that the log does not continue what
// this node has seen: what the key service gave must not be used.
func (a *Asked) Hear(r Answer) error {
	if len(r.Note) == 0 && len(r.Key) == 0 {
		if len(a.logs) > 0 {
			a.w.opts.Log.Warn("the key service shows no checkpoint of its audit log, and did before: is it of an older release?")
		}
		return nil
	}
	c, err := checkpoint.Parse(r.Key, r.Note)
	if err != nil {
		return failure.New(failure.Tampered, fmt.Errorf("key service: %w", err), hint)
	}
	i := slices.IndexFunc(a.logs, func(l Log) bool { return l.Last.Log == c.Log })
	if i < 0 {
		if len(a.logs) > 0 {
			a.w.opts.Log.Warn("the key service has an audit log that this node has not seen: another replica, or a log that was begun anew", "log", c.Log.String(), "entries", c.Size)
		}
		a.w.remember(Log{r.Key, c})
		return nil
	}
	if known := a.logs[i]; !bytes.Equal(known.Key, r.Key) {
		err = fmt.Errorf("%w: another key signs it", checkpoint.ErrBack)
	} else {
		err = c.Follows(known.Last.Checkpoint, r.Consistency)
	}
	if err != nil {
		return failure.New(failure.Tampered, fmt.Errorf("key service: %w", err), hint)
	}
	a.w.remember(Log{r.Key, c})
	return nil
}

const hint = `its records may be old as well: runbook, "A node says that the audit log went back"`

// remember takes a checkpoint that was verified.
func (w *Witness) remember(l Log) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.merge(l)
	w.dirty = true
	switch wait := w.opts.Every - w.opts.Now().Sub(w.stored); {
	case w.stop != nil:
	case !w.stored.IsZero() && wait > 0:
		w.stop = w.opts.After(wait, w.later)
	default:
		w.write()
	}
}

// later writes what came within the pause.
func (w *Witness) later() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stop == nil {
		return // it was closed meanwhile
	}
	w.stop = nil
	if w.dirty {
		w.write()
	}
}

// write is store, and says what is wrong. The lock is held.
func (w *Witness) write() {
	if err := w.store(); err != nil {
		w.opts.Log.Warn("what was seen of the key service's audit log is not kept", "error", err)
	}
}

// merge puts a log first. Of two answers that were under way at once the later one stays. The
// lock is held.
func (w *Witness) merge(l Log) {
	if i := w.index(l.Last.Log); i >= 0 {
		if w.logs[i].Last.Size > l.Last.Size {
			l = w.logs[i]
		}
		w.logs = slices.Delete(w.logs, i, i+1)
	}
	w.logs = slices.Insert(w.logs, 0, l)
	w.logs = w.logs[:min(len(w.logs), MaxLogs)]
}

// encode is what is kept: a version, a count, and the entries.
func encode(logs []Log) []byte {
	out := []byte{version, byte(len(logs))}
	for _, l := range logs {
		out = append(out, l.Key...)
		out = append(out, l.Last.Log[:]...)
		out = binary.BigEndian.AppendUint64(out, uint64(l.Last.Size))
		out = append(out, l.Last.Root[:]...)
		out = append(out, l.Last.Signature...)
	}
	return append(out, make([]byte, Size-len(out))...)
}

var errMemory = errors.New("not what this program wrote")

// decode is the inverse. What was damaged, as by a loss of power while it was written, is left
// out: its signature does not verify.
func decode(data []byte) (logs []Log, err error) {
	if len(data) == 0 {
		return nil, nil
	}
	if len(data) != Size || data[0] != version || data[1] > MaxLogs {
		return nil, errMemory
	}
	for i := range int(data[1]) {
		e := data[2+i*entrySize:][:entrySize]
		key := ed25519.PublicKey(slices.Clone(e[:32]))
		c := checkpoint.Checkpoint{Log: checkpoint.ID(e[32:48]), Size: int64(binary.BigEndian.Uint64(e[48:56]))}
		copy(c.Root[:], e[56:88])
		s, bad := checkpoint.Restore(key, c, e[88:])
		if bad != nil {
			err = fmt.Errorf("%w: %w", errMemory, bad)
			continue
		}
		logs = append(logs, Log{key, s})
	}
	return logs, err
}
