// Package revocation keeps the words of operators by which a machine, or a volume, gets no
// keys any more until they take them back.
//
// Each word is an object of its own, which is never written again: the storage, and every key
// service over it, can leave one out, but neither change one nor have a revocation look lifted.
// A key service never forgets one that it has seen, in the storage or in its audit log. The
// format is specified in docs/spec/volume-record.md.
package revocation

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/storage"
)

// Kind is what is revoked.
type Kind string

// The kinds.
const (
	Node   Kind = "node"   // a machine, by one identity that it attests, as KIND:IDENTITY
	Volume Kind = "volume" // a volume, by its ID
)

// Bounds in bytes, and of all words.
const (
	maxName   = 512
	maxReason = 1024
	maxWords  = 100_000
)

var (
	// ErrSubject means that a subject is none that can be revoked.
	ErrSubject = errors.New("not a node's identity or a volume's ID")
	// ErrSeveral means that somebody is named by all identities of a machine: it would be another
	// machine once it leaves one of them out.
	ErrSeveral = fmt.Errorf("%w: these are several", ErrSubject)
	// ErrWord means that an object is not the word that its name promises.
	ErrWord = errors.New("not a word of revocation")
	// ErrNotRevoked means that there is nothing to lift.
	ErrNotRevoked = errors.New("it is not revoked")
	// ErrNotStored means that a revocation is in force on this key service alone.
	ErrNotStored = errors.New("it is in force here, and other key services do not hear of it")
	// ErrTooMany means that the storage lists more than any operator says.
	ErrTooMany = fmt.Errorf("more than %d words of revocation", maxWords)
)

// Subject is a machine or a volume.
type Subject struct {
	Kind Kind   `json:"kind"`
	Name string `json:"name"`
}

// String is the subject as the audit log has it, for example "volume:data-1".
func (s Subject) String() string { return string(s.Kind) + ":" + s.Name }

// ParseSubject undoes String.
func ParseSubject(text string) (Subject, error) {
	kind, name, _ := strings.Cut(text, ":")
	s := Subject{Kind(kind), name}
	return s, s.Validate()
}

// Validate returns [ErrSubject] for what cannot be revoked.
func (s Subject) Validate() error {
	switch {
	case s.Kind == Node && strings.Contains(s.Name, "+"):
		return fmt.Errorf("%w: %.80q", ErrSeveral, s.String())
	case s.Kind == Volume && policy.ValidVolume(s.Name):
	case s.Kind == Node && s.Name != "" && len(s.Name) <= maxName && isPlain(s.Name):
	default:
		return fmt.Errorf("%w: %.80q", ErrSubject, s.String())
	}
	return nil
}

func isPlain(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsGraphic(r) })
}

func (s Subject) folder() string { return fmt.Sprintf("%s-%x", s.Kind, sha256.Sum256([]byte(s.Name))) }

// Word is what an operator said of a subject.
type Word struct {
	Subject
	Number  uint64    `json:"number"`  // 1, 2, … of this subject: the highest counts
	Revoked bool      `json:"revoked"` // or lifted
	By      string    `json:"by"`
	Reason  string    `json:"reason,omitempty"`
	At      time.Time `json:"at"`
}

func (w Word) id() string { return fmt.Sprintf("%s/%010d", w.folder(), w.Number) }

// Parse reads the body of a word that was stored under an ID. Its errors wrap [ErrWord].
func Parse(id string, body []byte) (Word, error) {
	var w Word
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	err := d.Decode(&w)
	if _, end := d.Token(); err == nil && !errors.Is(end, io.EOF) {
		err = errors.New("something comes after it")
	}
	if err == nil {
		err = w.Validate()
	}
	switch {
	case err != nil:
		return Word{}, fmt.Errorf("%w: %w", ErrWord, err)
	case w.Number == 0 || w.id() != id:
		return Word{}, fmt.Errorf("%w: it is another one", ErrWord)
	case len(w.By) > maxName || len(w.Reason) > maxReason || !isPlain(w.By) || !isPlain(w.Reason):
		return Word{}, fmt.Errorf("%w: its texts", ErrWord)
	}
	return w, nil
}

// freshFor is how long what was read last counts. Another key service's word is in force here
// after that, at the next request.
const freshFor = 5 * time.Second

// Book is all words that are known. It is safe for concurrent use.
type Book struct {
	records *macstore.Store
	now     func() time.Time
	log     *slog.Logger

	reading sync.Mutex // by one at a time; taken before mu
	known   []Word     // by the audit log alone, as far as is known
	mu      sync.Mutex
	words   map[Subject]Word // the last of each
	read    map[string]bool  // IDs of objects
	at      time.Time        // when the storage was read
}

// NewBook returns a book of what the audit log knows. Call Load before the first Check.
func NewBook(records *macstore.Store, now func() time.Time, log *slog.Logger, known []Word) *Book {
	b := &Book{records: records, now: now, log: log, known: known, words: map[Subject]Word{}, read: map[string]bool{}}
	for _, w := range known {
		b.note(w)
	}
	return b
}

// note keeps a word. Of two with one number, as two key services can say them that do not hear
// of each other, the one that revokes counts.
func (b *Book) note(w Word) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if last, ok := b.words[w.Subject]; !ok || w.Number > last.Number || w.Number == last.Number && w.Revoked {
		b.words[w.Subject] = w
	}
}

// Load reads what storage has and was not read yet.
func (b *Book) Load(ctx context.Context) error {
	b.reading.Lock()
	defer b.reading.Unlock()
	if err := b.load(ctx); err != nil {
		return err
	}
	b.putBack(ctx)
	return nil
}

// putBack stores what the audit log has and the storage does not, so that other key services
// hear of it: a crash came between the two, or the storage lost it.
func (b *Book) putBack(ctx context.Context) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, w := range b.known {
		if b.words[w.Subject] != w || b.read[w.id()] {
			continue
		}
		b.mu.Unlock()
		err := b.put(ctx, w)
		b.mu.Lock()
		if err != nil {
			b.log.Warn("a word of revocation is in force here, and not in the storage", "subject", w.Subject, "error", err)
		}
	}
	b.known = nil
}

func (b *Book) load(ctx context.Context) error {
	started := b.now()
	const page = 1000
	for after := ""; ; {
		ids, err := b.records.List(ctx, macstore.Revocation, after, page)
		if err != nil {
			return fmt.Errorf("revocations: %w", err)
		}
		for _, id := range ids {
			if err := b.take(ctx, id); err != nil {
				return fmt.Errorf("revocations: %w", err)
			}
		}
		if len(ids) < page {
			break
		}
		after = ids[len(ids)-1]
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.at = started
	return nil
}

// take reads one object, once. What is no word of ours is left out: whoever can write the
// storage can put something there, and nothing that counts.
func (b *Book) take(ctx context.Context, id string) error {
	b.mu.Lock()
	known, n := b.read[id], len(b.read)
	b.mu.Unlock()
	if known {
		return nil
	}
	if n >= maxWords {
		return ErrTooMany
	}
	body, _, err := b.records.Get(ctx, macstore.Revocation, id)
	var w Word
	if err == nil {
		w, err = Parse(id, body)
	}
	switch {
	case err == nil:
		b.note(w)
	case errors.Is(err, storage.ErrNotFound):
		return nil // it is read when it is there
	case errors.Is(err, ErrWord) || macstore.Foreign(err):
		b.log.Warn("an object among the revocations is none", "id", id, "error", err)
	default:
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.read[id] = true
	return nil
}

// Revoked returns the word by which one of the subjects is revoked, or nil. The storage is
// read again if that was long ago; if it cannot be, what is known counts.
func (b *Book) Revoked(ctx context.Context, subjects ...Subject) *Word {
	b.mu.Lock()
	stale := b.now().Sub(b.at) >= freshFor
	b.mu.Unlock()
	if stale && b.reading.TryLock() {
		err := b.load(ctx)
		b.reading.Unlock()
		if err != nil && ctx.Err() == nil {
			b.log.Warn("could not read whether somebody was revoked by another key service", "error", err)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range subjects {
		if w, ok := b.words[s]; ok && w.Revoked {
			return &w
		}
	}
	return nil
}

// All returns those that are revoked, in order.
func (b *Book) All(ctx context.Context) ([]Word, error) {
	if err := b.Load(ctx); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	all := []Word{}
	for _, w := range b.words {
		if w.Revoked {
			all = append(all, w)
		}
	}
	slices.SortFunc(all, func(x, y Word) int { return strings.Compare(x.Subject.String(), y.Subject.String()) })
	return all, nil
}

// maxConflicts bounds how often a word is said again because another one came in between.
const maxConflicts = 8

// Say stores a word of an operator's, and has it count here at once. Revoking what is revoked
// already gives the word that is there. log writes it down: before it takes effect if it lifts
// something. [ErrNotRevoked], [ErrSubject]; [ErrNotStored] with a word that counts here.
func (b *Book) Say(ctx context.Context, w Word, log func(Word) error) (Word, error) {
	if err := w.Validate(); err != nil {
		return Word{}, err
	}
	if len(w.Reason) > maxReason || !isPlain(w.Reason) {
		return Word{}, fmt.Errorf("%w: the reason is of at most %d bytes on one line", ErrWord, maxReason)
	}
	b.reading.Lock()
	defer b.reading.Unlock()
	err := error(storage.ErrConflict)
	for range maxConflicts {
		loadErr := b.load(ctx)
		b.mu.Lock()
		last := b.words[w.Subject]
		b.mu.Unlock()
		w.Number, w.At = last.Number+1, b.now().UTC().Truncate(time.Second)
		switch {
		case w.Revoked && last.Revoked:
			return last, nil
		case loadErr != nil:
			err = loadErr
		case !w.Revoked && !last.Revoked:
			return Word{}, ErrNotRevoked
		case !w.Revoked:
			if err = log(w); err == nil {
				err = b.put(ctx, w)
			}
		default:
			err = b.put(ctx, w)
		}
		if !errors.Is(err, storage.ErrConflict) {
			break
		}
	}
	if !w.Revoked {
		if err != nil {
			return Word{}, err
		}
		b.note(w)
		return w, nil
	}
	b.note(w)
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrNotStored, err)
	}
	return w, errors.Join(err, log(w))
}

func (b *Book) put(ctx context.Context, w Word) error {
	body, err := json.Marshal(w)
	if err != nil {
		return err
	}
	return b.records.Put(ctx, macstore.Revocation, w.id(), body, storage.Absent)
}
