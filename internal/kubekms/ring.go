package kubekms

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
)

// snapshot is what requests see. It never changes; its keys may be wiped under a
// reader, whose use of one then fails as a whole and is tried on the next snapshot.
type snapshot struct {
	state   State
	current *key // encrypts; nil if there are no keys
	keyID   string
	keys    []*key
	err     error // why there is none, or why the source does not answer
}

// Ring is the KEKs in memory: one encrypts, all decrypt. Requests read it without a
// lock; one writer, the [Refresher], changes it.
type Ring struct {
	mode     Mode
	needed   int           // observations until another KEK encrypts
	keepOld  time.Duration // how long a KEK decrypts that the source does not give any more
	snapshot atomic.Pointer[snapshot]

	mu      sync.Mutex // of the writer
	entries map[string]*entry
	current string // key_id
	pending string // key_id that may become current
	count   int    // observations of it in a row
	kept    []kept // old KEKs, after a purge
	last    string // key_id of the KEK that encrypted last
	turns   map[string]int
}

type entry struct {
	key  *key
	seen time.Time
}

// newRing returns an empty ring.
func newRing(mode Mode, observations int, keepOld time.Duration) *Ring {
	r := &Ring{mode: mode, needed: observations, keepOld: keepOld, entries: map[string]*entry{}, turns: map[string]int{}}
	r.snapshot.Store(&snapshot{state: Starting, err: failure.Newf(failure.State, "", "nothing was fetched yet")})
	return r
}

// accept takes over what a source gave. A KEK that is not the current one becomes it
// after as many observations in a row as are needed, and decrypts meanwhile: another
// replica may have it already. promoted says that it did.
func (r *Ring) accept(k *Keys, now time.Time) (promoted bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	first, all, err := k.named()
	if err != nil {
		return false, err
	}
	unsettled := false
	switch {
	case r.current == "":
		r.current, promoted = first, true
		r.pending, r.count = "", 0
	case first == r.current:
		r.pending, r.count = "", 0
	case first != r.pending:
		unsettled = r.pending != ""
		r.pending, r.count = first, 1
	default:
		r.count++
	}
	if r.pending != "" && r.count >= r.needed {
		r.current, promoted = r.pending, true
		r.pending, r.count = "", 0
	}
	var wipe []*key
	for _, one := range all {
		if have, ok := r.entries[one.id]; ok {
			have.seen = now
			wipe = append(wipe, one)
			continue
		}
		r.entries[one.id] = &entry{one, now}
	}
	r.turn(r.current)
	restoreErr := r.restore(now)
	for id, e := range r.entries {
		if id != r.current && !e.seen.Equal(now) && now.Sub(e.seen) >= r.keepOld {
			wipe = append(wipe, e.key)
			delete(r.entries, id)
		}
	}
	wipe = append(wipe, r.surplus()...)
	if !unsettled {
		r.publish(Serving, nil)
	} else {
		old := r.snapshot.Load()
		r.publish(old.state, old.err)
		err = failure.New(failure.State, ErrUnsettled, "every run of the source must give the same KEK")
	}
	return promoted, errors.Join(err, restoreErr, closeAll(wipe))
}

// maxKeys bounds a ring: a source that changes its mind often must not fill memory,
// nor make the format of 2018, which tries every KEK, slow.
const maxKeys = 64

// surplus takes the KEKs out that were seen longest ago.
func (r *Ring) surplus() (out []*key) {
	for len(r.entries) > maxKeys {
		var oldest string
		for id, e := range r.entries {
			if id != r.current && (oldest == "" || e.seen.Before(r.entries[oldest].seen)) {
				oldest = id
			}
		}
		out = append(out, r.entries[oldest].key)
		delete(r.entries, oldest)
	}
	return out
}

// pendingKey returns the key_id that waits for its promotion.
func (r *Ring) pendingKey() (id string, count int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pending, r.count
}

// mark changes the state and keeps the keys.
func (r *Ring) mark(s State, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.publish(s, err)
}

// purge wipes every key. Requests that use one at this moment finish first; later
// ones fail with err's class.
func (r *Ring) purge(err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	keepErr := r.keep()
	var wipe []*key
	for _, e := range r.entries {
		wipe = append(wipe, e.key)
	}
	clear(r.entries)
	r.current, r.pending, r.count = "", "", 0
	r.publish(Purged, err)
	return errors.Join(keepErr, closeAll(wipe))
}

// publish makes the snapshot of what there is. The lock is held; keys are wiped only
// after they are in no snapshot.
func (r *Ring) publish(s State, err error) {
	next := &snapshot{state: s, err: err}
	if e, ok := r.entries[r.current]; ok {
		next.current, next.keyID = e.key, r.keyID(r.current)
		next.keys = append(next.keys, e.key)
	}
	for id, e := range r.entries {
		if id != r.current {
			next.keys = append(next.keys, e.key)
		}
	}
	slices.SortStableFunc(next.keys[min(1, len(next.keys)):], func(a, b *key) int {
		return r.entries[b.id].seen.Compare(r.entries[a.id].seen)
	})
	r.snapshot.Store(next)
}

func closeAll(keys []*key) error {
	var err error
	for _, k := range keys {
		err = errors.Join(err, k.secret.Close())
	}
	return err
}

// noKey is the error of a snapshot without keys.
func (s *snapshot) noKey() error {
	f := failure.Of(s.err)
	return failure.New(f.Class, &noKeyError{s.err}, f.Hint)
}

// noKeyError has the words of the last failure, but not its place in the chain: the
// class around it counts.
type noKeyError struct{ last error }

func (e *noKeyError) Error() string   { return fmt.Sprintf("%v: %v", ErrNoKey, e.last) }
func (e *noKeyError) Is(t error) bool { return t == ErrNoKey }

// with calls f with a snapshot that has keys, and again with the next one if a key was
// wiped under it.
func (r *Ring) with(f func(*snapshot) error) error {
	for {
		s := r.snapshot.Load()
		if s.current == nil {
			return s.noKey()
		}
		err := f(s)
		if !errors.Is(err, secret.ErrClosed) {
			return err
		}
		if r.snapshot.Load() == s {
			return failure.New(failure.Internal, err, "") // never: keys leave the snapshot first
		}
	}
}

// encrypt returns a ciphertext and the key_id that it is under.
func (r *Ring) encrypt(p purpose, plain []byte) (out []byte, keyID string, err error) {
	limit := MaxCiphertextV1
	if p == purposeV2 {
		limit = MaxCiphertextV2
	}
	overhead := envelopeOverhead
	if r.mode == AESCBC {
		overhead = len(legacyPrefix) + 16 + 16
	}
	if len(plain) > limit-overhead {
		return nil, "", failure.New(failure.Usage, fmt.Errorf("%w: %d bytes, allowed are %d", ErrTooLong, len(plain), limit-overhead), "")
	}
	err = r.with(func(s *snapshot) (err error) {
		keyID = s.keyID
		if r.mode == AESCBC {
			out, err = s.current.sealLegacy(plain)
		} else {
			out, err = s.current.seal(p, plain)
		}
		return err
	})
	return out, keyID, err
}

// decrypt opens a ciphertext. keyID names the KEK; empty where the API knows none.
func (r *Ring) decrypt(p purpose, blob []byte, keyID string) (plain []byte, err error) {
	err = r.with(func(s *snapshot) (err error) {
		keys := s.keys
		if keyID != "" {
			name := kekOf(keyID)
			i := slices.IndexFunc(keys, func(k *key) bool { return k.id == name })
			if i < 0 {
				return failure.New(failure.NotFound, ErrUnknownKey, "the source gives this KEK no more: see old KEKs in docs/kubernetes.md")
			}
			keys = keys[i : i+1]
		}
		if isLegacy(blob) {
			plain, err = openLegacy(keys, blob)
			return err
		}
		id, ok := envelopeKey(blob)
		i := slices.IndexFunc(keys, func(k *key) bool { return k.raw == id })
		switch {
		case !ok:
			return ErrDecrypt
		case i < 0 && keyID == "":
			return failure.New(failure.NotFound, ErrUnknownKey, "the source gives this KEK no more: see old KEKs in docs/kubernetes.md")
		case i < 0:
			return ErrDecrypt
		}
		plain, err = keys[i].open(p, blob)
		return err
	})
	if errors.Is(err, ErrDecrypt) {
		err = failure.New(failure.WrongKey, ErrDecrypt, "")
	}
	return plain, err
}

// Health is what Status says: all of it from one snapshot.
type Health struct {
	State State
	KeyID string // of the KEK that encrypts; empty if there is none
	Keys  int
	Err   error // of the source, in the states that are not healthy
}

// OK reports that the KEKs are confirmed often enough.
func (h Health) OK() bool { return h.State == Serving || h.State == Failing }

// Health returns the present one.
func (r *Ring) Health() Health {
	s := r.snapshot.Load()
	h := Health{State: s.state, Keys: len(s.keys), Err: s.err}
	if s.current != nil {
		h.KeyID = s.keyID
	} else {
		h.Err = s.noKey()
	}
	return h
}
