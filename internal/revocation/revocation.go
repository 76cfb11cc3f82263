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
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/keyagent/keyagent/attestation"
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
	case s.Kind == Node && len(s.Name) <= maxName && isPlain(s.Name) && isIdentity(s.Name):
	default:
		return fmt.Errorf("%w: %.80q", ErrSubject, s.String())
	}
	return nil
}

// isIdentity keeps a typing error from revoking nobody.
func isIdentity(name string) bool {
	kind, id, _ := strings.Cut(name, ":")
	switch attestation.Kind(kind) {
	case attestation.TPM:
		raw, err := hex.DecodeString(id)
		return err == nil && len(raw) == sha256.Size && strings.ToLower(id) == id
	case attestation.SNP, attestation.TDX, attestation.Nitro, attestation.Azure, attestation.SVSM:
		return id != ""
	}
	return false
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
	ID      string    `json:"id"`      // of the saying: a word that had to be stored under another number has the same
	By      string    `json:"by"`
	Reason  string    `json:"reason,omitempty"`
	At      time.Time `json:"at"`
}

func (w Word) id() string { return w.Subject.id(w.Number) }

func (s Subject) id(number uint64) string { return fmt.Sprintf("%s/%010d", s.folder(), number) }

// same reports whether both are one saying.
func (w Word) same(o Word) bool {
	return w.ID == o.ID && w.Revoked == o.Revoked && w.Subject == o.Subject
}

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
	case len(w.By) > maxName || len(w.Reason) > maxReason || len(w.ID) > maxName || !isPlain(w.ID) || !isPlain(w.By) || !isPlain(w.Reason):
		return Word{}, fmt.Errorf("%w: its texts", ErrWord)
	}
	return w, nil
}

const (
	// freshFor is how long what was read last counts. Another key service's word is in force
	// here after that, at the next request.
	freshFor = 5 * time.Second
	// waitFor is how long a request waits for that; a storage that takes longer is read for
	// those that come later.
	waitFor = time.Second
	// readFor bounds one reading.
	readFor = 30 * time.Second
)

// Book is all words that are known. It is safe for concurrent use.
type Book struct {
	records *macstore.Store
	now     func() time.Time
	log     *slog.Logger

	saying  sync.Mutex // by one operator at a time; taken before reading
	reading sync.Mutex // by one at a time; taken before mu
	mu      sync.Mutex
	words   map[Subject]Word // the last of each
	read    map[string]bool  // IDs of objects that were read, or written
	behind  map[Subject]Word // in force here, and not in the storage as far as is known
	next    time.Time        // when the storage is read again
	busy    chan struct{}    // closed when a reading that is under way ends
}

// NewBook returns a book of what the audit log knows. Call Load before the first Revoked.
func NewBook(records *macstore.Store, now func() time.Time, log *slog.Logger, known []Word) *Book {
	b := &Book{records: records, now: now, log: log, words: map[Subject]Word{}, read: map[string]bool{}, behind: map[Subject]Word{}}
	for _, w := range known {
		b.note(w, false)
	}
	return b
}

// note keeps a word. Of two with one number, as two key services can say them that do not hear
// of each other, the one that revokes counts. stored says that others hear of it. A revocation
// that was not stored yet is not undone by what others said without hearing of it: it is said
// again after that.
func (b *Book) note(w Word, stored bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	behind, waits := b.behind[w.Subject]
	last, ok := b.words[w.Subject]
	newer := !ok || w.Number > last.Number || w.Number == last.Number && w.Revoked && !last.Revoked
	switch {
	case stored && waits && behind.same(w):
		delete(b.behind, w.Subject)
		if newer || w.Number == last.Number {
			b.words[w.Subject] = w
		}
	case !newer:
	case stored && waits && behind.Revoked:
		behind.Number = w.Number + 1
		b.words[w.Subject], b.behind[w.Subject] = behind, behind
	default:
		b.words[w.Subject] = w
		if b.behind[w.Subject] = w; stored {
			delete(b.behind, w.Subject)
		}
	}
}

// Load reads what storage has and was not read yet, and stores what it does not have.
func (b *Book) Load(ctx context.Context) error {
	b.reading.Lock()
	defer b.reading.Unlock()
	began := b.now()
	if err := b.load(ctx); err != nil {
		return err
	}
	b.mu.Lock()
	b.next = began.Add(freshFor)
	b.mu.Unlock()
	b.catchUp(ctx)
	return nil
}

func (b *Book) load(ctx context.Context) error {
	const page = 1000
	for after, listed := "", 0; ; {
		ids, err := b.records.List(ctx, macstore.Revocation, after, page)
		if listed += len(ids); err == nil && listed > maxWords {
			err = ErrTooMany
		}
		if err != nil {
			return fmt.Errorf("revocations: %w", err)
		}
		for _, id := range ids {
			if err := b.take(ctx, id); err != nil {
				return fmt.Errorf("revocations: %w", err)
			}
		}
		if len(ids) < page {
			return nil
		}
		after = ids[len(ids)-1]
	}
}

// take reads one object, once. It skips what this key service did not write: an
// attacker who can write the storage can add objects, but not one that counts.
func (b *Book) take(ctx context.Context, id string) error {
	b.mu.Lock()
	known := b.read[id]
	b.mu.Unlock()
	if known {
		return nil
	}
	body, _, err := b.records.Get(ctx, macstore.Revocation, id)
	var w Word
	if err == nil {
		w, err = Parse(id, body)
	}
	switch {
	case err == nil:
		b.note(w, true)
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

// catchUp stores what is in force here and not in the storage, so that other key services
// hear of it: it could not be stored, a crash came in between, or the storage lost it.
func (b *Book) catchUp(ctx context.Context) {
	b.mu.Lock()
	subjects := slices.Collect(maps.Keys(b.behind))
	b.mu.Unlock()
	for _, s := range subjects {
		if err := b.store(ctx, s); err != nil {
			b.log.Warn("a word of revocation is in force here, and not in the storage", "subject", s, "error", err)
		}
	}
}

// maxTaken bounds how many names are tried that something else has.
const maxTaken = 16

// free is the first number from n on whose name nothing is known to have.
func (b *Book) free(s Subject, n uint64) uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.read[s.id(n)] {
		n++
	}
	return n
}

// store stores the word of a subject that is not stored yet.
func (b *Book) store(ctx context.Context, s Subject) error {
	for range maxTaken {
		b.mu.Lock()
		w, waits := b.behind[s]
		b.mu.Unlock()
		if !waits {
			return nil
		}
		w.Number = b.free(s, w.Number)
		if err := b.put(ctx, w); !errors.Is(err, storage.ErrConflict) {
			return err
		}
	}
	return fmt.Errorf("%w: %d names are taken", storage.ErrConflict, maxTaken)
}

// put stores a word under its number, and has it count. If something else has the name, that
// is read: [storage.ErrConflict].
func (b *Book) put(ctx context.Context, w Word) error {
	body, err := json.Marshal(w)
	if err != nil {
		return err
	}
	err = b.records.Put(ctx, macstore.Revocation, w.id(), body, storage.Absent)
	if errors.Is(err, storage.ErrConflict) {
		if loadErr := b.load(ctx); loadErr != nil {
			return loadErr
		}
		b.mu.Lock()
		b.read[w.id()] = true // whatever it is
		b.mu.Unlock()
		return err
	}
	if err != nil {
		return err
	}
	b.note(w, true)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.read[w.id()] = true
	return nil
}

// freshen reads the storage again if that was long ago. It is read once for all that ask, for
// as long as it takes, and a request waits a moment at most.
func (b *Book) freshen(ctx context.Context) {
	b.mu.Lock()
	busy := b.busy
	if now := b.now(); busy == nil && !now.Before(b.next) {
		busy = make(chan struct{})
		b.busy, b.next = busy, now.Add(freshFor)
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), readFor)
			defer cancel()
			err := b.Load(ctx)
			if err != nil {
				b.log.Warn("could not read whether another key service revoked something", "error", err)
			}
			b.mu.Lock()
			defer b.mu.Unlock()
			b.busy = nil
			close(busy)
		}()
	}
	b.mu.Unlock()
	if busy == nil {
		return
	}
	patience := time.NewTimer(waitFor)
	defer patience.Stop()
	select {
	case <-busy:
	case <-patience.C:
	case <-ctx.Done():
	}
}

// Revoked returns the word by which one of the subjects is revoked, or nil. If the storage
// cannot be read, what is known counts.
func (b *Book) Revoked(ctx context.Context, subjects ...Subject) *Word {
	b.freshen(ctx)
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

// Say has a word of an operator's count, and stores it. Revoking counts here at once, also
// where it cannot be stored: [ErrNotStored], until a repetition or a later reading stores it.
// Revoking what is revoked gives the word that is there. log writes a word down: before it
// counts if it lifts something. [ErrNotRevoked], [ErrSubject].
func (b *Book) Say(ctx context.Context, w Word, log func(Word) error) (Word, error) {
	if err := w.Validate(); err != nil {
		return Word{}, err
	}
	if len(w.Reason) > maxReason || !isPlain(w.Reason) {
		return Word{}, fmt.Errorf("%w: the reason is of at most %d bytes on one line", ErrWord, maxReason)
	}
	ctx, cancel := context.WithTimeout(ctx, readFor)
	defer cancel()
	b.saying.Lock()
	defer b.saying.Unlock()
	w.At = b.now().UTC().Truncate(time.Second)
	if w.Revoked {
		return b.revoke(ctx, w, log)
	}
	return b.lift(ctx, w, log)
}

func (b *Book) last(s Subject) (w Word, behind bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, behind = b.behind[s]
	return b.words[s], behind
}

func (b *Book) revoke(ctx context.Context, w Word, log func(Word) error) (last Word, err error) {
	var logErr error
	for range maxTaken {
		if last, _ = b.last(w.Subject); !last.Revoked {
			w.Number = last.Number + 1
			b.note(w, false) // from here on it counts
			logErr = errors.Join(logErr, log(w))
		}
		err := b.Load(ctx) // stores it
		last, behind := b.last(w.Subject)
		switch {
		case !last.Revoked:
			continue // somebody lifted what this one had not heard of: it is said again, after that
		case err == nil && behind:
			err = storage.ErrConflict
			fallthrough
		case err != nil:
			return last, errors.Join(fmt.Errorf("%w: %w", ErrNotStored, err), logErr)
		}
		return last, logErr
	}
	return last, errors.Join(storage.ErrConflict, logErr)
}

func (b *Book) lift(ctx context.Context, w Word, log func(Word) error) (Word, error) {
	if err := b.Load(ctx); err != nil {
		return Word{}, err
	}
	b.reading.Lock()
	defer b.reading.Unlock()
	err := error(storage.ErrConflict)
	for range maxTaken {
		last, _ := b.last(w.Subject)
		if !last.Revoked {
			return Word{}, ErrNotRevoked
		}
		w.Number = b.free(w.Subject, last.Number+1)
		if err := log(w); err != nil {
			return Word{}, err
		}
		b.mu.Lock()
		delete(b.behind, w.Subject) // it is lifted as well, stored or not
		b.mu.Unlock()
		if err = b.put(ctx, w); err == nil {
			return w, nil
		}
		if !errors.Is(err, storage.ErrConflict) {
			break
		}
	}
	// It is not to count at the next start, which reads the log.
	w.Revoked, w.Reason = true, "the word that lifts it was not stored"
	b.note(w, false)
	return Word{}, errors.Join(err, log(w))
}
