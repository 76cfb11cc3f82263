package volume

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage"
)

var (
	// ErrNoVolume means that the volume has no record.
	ErrNoVolume = errors.New("volume does not exist")
	// ErrLength means that a volume's key has another length than a caller asks for.
	ErrLength = errors.New("key has another length")
	// ErrRollback means that storage shows less than this key service has seen.
	ErrRollback = errors.New("storage went back to an older state")
)

// DEKLength is the length of a volume's DEK in bytes, unless its first caller asked for
// another one.
const DEKLength = 32

// maxConflicts bounds how often a change is tried against other writers.
const maxConflicts = 16

// Skew is how far the clocks of key services over one storage may be apart. A lease
// that another one recorded ends so much later here.
const Skew = 10 * time.Second

// Options configure [NewStore]. All are required.
type Options struct {
	KMS     kms.KMS
	Records *macstore.Store
	Now     func() time.Time
	// Alone says that no other key service has the storage: renewals of leases are
	// remembered here, and not written.
	Alone bool
}

// Store keeps the records of volumes. It is safe for concurrent use.
type Store struct {
	kms     kms.KMS
	records *macstore.Store
	now     func() time.Time
	alone   bool
	started time.Time
	turns   turns

	mu    sync.Mutex
	seen  seen
	lives map[string]time.Time // end of a lease by its ID, as this process granted it
}

// NewStore returns the volumes of a storage.
func NewStore(opts Options) *Store {
	return &Store{kms: opts.KMS, records: opts.Records, now: opts.Now, alone: opts.Alone, started: opts.Now(),
		seen: newSeen(), lives: map[string]time.Time{}}
}

// Ends returns when the lease of a record ends, as far as this key service can tell.
func (s *Store) Ends(r *Record) time.Time {
	if r.Lease == nil {
		return time.Time{}
	}
	ends := s.until(r.Lease)
	if !s.alone {
		ends = later(ends, r.Lease.Until.Add(Skew))
	}
	return ends
}

// until is when a lease ends by the clock of this process: what the record says, or
// the renewals that were not written.
func (s *Store) until(l *Lease) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	mine, known := s.lives[l.ID]
	if !known && s.alone {
		// It was granted before this process began, which does not know of its renewals.
		mine = s.started.Add(l.Term())
	}
	// Of two that are equal the one of this process: it has the reading of a clock that
	// nobody sets, and counts by that.
	return later(mine, l.Until)
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// Get returns the record of a volume. A volume that was seen and has no record now, or
// an older one, is never taken for a new one.
func (s *Store) Get(ctx context.Context, volume string) (*Record, error) {
	r, _, err := s.get(ctx, volume)
	return r, err
}

func (s *Store) get(ctx context.Context, volume string) (*Record, storage.Version, error) {
	// What was seen before the read: a change that lands during it is newer than
	// what is read, and no rollback.
	seen := s.Seen(volume)
	r, version, err := s.read(ctx, volume)
	switch {
	case errors.Is(err, ErrNoVolume) && seen > 0:
		return nil, "", fmt.Errorf("%w: volume %q is gone, its revision %d was seen", ErrRollback, volume, seen)
	case err != nil:
		return nil, "", err
	case r.Revision < seen:
		return nil, "", fmt.Errorf("%w: volume %q has revision %d, %d was seen", ErrRollback, volume, r.Revision, seen)
	}
	s.NoteRevision(volume, r.Revision)
	return r, version, nil
}

// Peek returns the record that storage has, whatever was seen of the volume. It is for
// people; nothing follows from it.
func (s *Store) Peek(ctx context.Context, volume string) (*Record, error) {
	r, _, err := s.read(ctx, volume)
	return r, err
}

// Purge destroys what storage keeps of the record's earlier states, see [storage.Purger].
func (s *Store) Purge(ctx context.Context, volume string) (int, error) {
	return s.records.Purge(ctx, macstore.Volume, volume)
}

// Import makes a record that was lost, unless there is one. It is newer than all that
// was seen of the volume.
func (s *Store) Import(ctx context.Context, r *Record) (*Record, error) {
	done, err := s.turns.take(ctx, r.VolumeID)
	if err != nil {
		return nil, err
	}
	defer done()
	return s.update(ctx, r.VolumeID, s.read, func(found *Record) error {
		if found.State != Absent {
			return fmt.Errorf("%w: there is a record, and it is %s", ErrTransition, found.State)
		}
		seen := s.Seen(r.VolumeID)
		*found = *r
		found.Revision, found.Created = seen, s.now().UTC()
		return nil
	})
}

// read does not ask what was seen.
func (s *Store) read(ctx context.Context, volume string) (*Record, storage.Version, error) {
	body, version, err := s.records.Get(ctx, macstore.Volume, volume)
	if errors.Is(err, storage.ErrNotFound) {
		return nil, "", ErrNoVolume
	}
	var r *Record
	if err == nil {
		r, err = Parse(volume, body)
	}
	if err != nil {
		return nil, "", fmt.Errorf("record of %q: %w", volume, err)
	}
	return r, version, nil
}

// Update changes the record of a volume by f, which gets the record as it is stored,
// and writes it unless somebody else wrote meanwhile: then f gets the new one. A
// volume without a record gives f one that is [Absent]. An error of f changes
// nothing, and nothing is written if f changes nothing.
func (s *Store) Update(ctx context.Context, volume string, f func(*Record) error) (*Record, error) {
	done, err := s.turns.take(ctx, volume)
	if err != nil {
		return nil, err
	}
	defer done()
	return s.update(ctx, volume, s.get, f)
}

type getter func(ctx context.Context, volume string) (*Record, storage.Version, error)

func (s *Store) update(ctx context.Context, volume string, get getter, f func(*Record) error) (*Record, error) {
	for range maxConflicts {
		r, version, err := get(ctx, volume)
		if errors.Is(err, ErrNoVolume) {
			r, err = &Record{VolumeID: volume}, nil
		}
		if err != nil {
			return nil, err
		}
		s.recall(r)
		was, before := r.State, r.Revision
		var lease Lease
		if r.Lease != nil {
			lease = *r.Lease
		}
		old, err := r.Encode()
		if err != nil {
			return nil, err
		}
		if err := f(r); err != nil {
			return nil, err
		}
		next, err := r.Encode()
		if err != nil {
			return nil, err
		}
		if bytes.Equal(old, next) {
			if was == Absent {
				return nil, ErrNoVolume
			}
			return r, nil
		}
		if !was.allows(r.State) {
			return nil, fmt.Errorf("%w: from %q to %q", ErrTransition, was, r.State)
		}
		r.Revision, r.Updated = max(before, r.Revision)+1, s.now().UTC()
		err = s.put(ctx, r, version)
		if err == nil && r.Lease != nil && *r.Lease != lease {
			s.remember(r.Lease)
		}
		if !errors.Is(err, storage.ErrConflict) {
			return r, err
		}
	}
	return nil, fmt.Errorf("record of %q: %w", volume, storage.ErrConflict)
}

func (s *Store) put(ctx context.Context, r *Record, expect storage.Version) error {
	if err := r.check(); err != nil {
		return fmt.Errorf("record of %q would not be one: %w", r.VolumeID, err)
	}
	body, err := r.Encode()
	if err != nil {
		return err
	}
	if err := s.records.Put(ctx, macstore.Volume, r.VolumeID, body, expect); err != nil {
		return fmt.Errorf("record of %q: %w", r.VolumeID, err)
	}
	s.NoteRevision(r.VolumeID, r.Revision)
	return nil
}

// Obtain returns the record of a volume and makes it, pending, if there is none. All
// who race to make it get the same one. Length is that of a new key, 0 for [DEKLength].
func (s *Store) Obtain(ctx context.Context, volume, owner string, length int) (*Record, error) {
	r, err := s.Get(ctx, volume)
	if !errors.Is(err, ErrNoVolume) {
		return r, err
	}
	key, err := s.NewKey(ctx, kms.Binding{VolumeID: volume, Purpose: kms.VolumeDEK, Version: 1, Length: cmp.Or(length, DEKLength)})
	if err != nil {
		return nil, err
	}
	id, err := uuid.NewRandom()
	if err != nil {
		return nil, err
	}
	return s.Update(ctx, volume, func(r *Record) error {
		if r.State != Absent {
			return nil // somebody else was faster
		}
		*r = Record{VolumeID: volume, State: Pending, Generation: 1, Owner: owner, LUKSUUID: id.String(),
			KeyVersion: key.Version, Keys: []WrappedDEK{key}, Created: s.now().UTC()}
		return nil
	})
}

// NewKey makes a key. Only its wrapped form counts: it is unwrapped from that when it
// is released, so that a key that cannot come back is never used. One that is derived gets a
// salt, which is in the record alone: with that it is gone.
func (s *Store) NewKey(ctx context.Context, b kms.Binding) (WrappedDEK, error) {
	if kms.Salts(s.kms) {
		b.Salt = kms.NewSalt()
	}
	return s.KeyOf(ctx, b)
}

// KeyOf makes the key of a binding as it stands.
func (s *Store) KeyOf(ctx context.Context, b kms.Binding) (WrappedDEK, error) {
	key, w, err := s.kms.Generate(ctx, b)
	if err != nil {
		return WrappedDEK{}, err
	}
	return WrappedDEK{b.Version, b.Length, b.Salt, w}, key.Close()
}

// Renew renews the caller's lease. Where this key service is alone it is remembered,
// and written only if more than its end changes. before is who held it.
func (s *Store) Renew(ctx context.Context, volume string, c *Caller, t Terms) (r *Record, before Holder, err error) {
	done, err := s.turns.take(ctx, volume)
	if err != nil {
		return nil, before, err
	}
	defer done()
	remembered := errors.New("remembered")
	rec, err := s.update(ctx, volume, s.get, func(found *Record) error {
		r = found
		old := r.Lease
		if old != nil {
			before = old.Holder
		}
		if err := r.Renew(c, t, s.now()); err != nil || r.Lease == nil {
			return err
		}
		same := *r.Lease
		same.Until = old.Until
		if s.alone && same == *old {
			s.remember(r.Lease)
			return remembered
		}
		return nil
	})
	if errors.Is(err, remembered) {
		return r, before, nil
	}
	return rec, before, err
}

// remember remembers the end of a lease, and forgets those that ended long ago.
func (s *Store) remember(l *Lease) {
	s.mu.Lock()
	defer s.mu.Unlock()
	until := later(s.now().Add(l.Term()), l.Until)
	s.lives[l.ID] = later(s.lives[l.ID], until)
	if len(s.lives) > 4096 && len(s.lives)&(len(s.lives)-1) == 0 {
		for other, end := range s.lives {
			if until.Sub(end) > 48*time.Hour {
				delete(s.lives, other)
			}
		}
	}
}

// Accept makes the record that storage has the one that counts, whatever was seen of
// the volume. It returns what it went back from.
func (s *Store) Accept(ctx context.Context, volume string) (r *Record, seen uint64, err error) {
	done, err := s.turns.take(ctx, volume)
	if err != nil {
		return nil, 0, err
	}
	defer done()
	seen = s.Seen(volume)
	r, err = s.update(ctx, volume, s.read, func(r *Record) error {
		if r.State == Absent {
			return ErrNoVolume
		}
		if r.Revision >= seen {
			return nil
		}
		// What held it then holds it no more. From here on it is newer than all that was.
		r.Revision, r.Lease = seen, nil
		if r.Attempt != nil {
			r.Attempt.ID = NewID()
		}
		return nil
	})
	return r, seen, err
}

// recall puts the renewals that were not written into a record that may be written
// now: after a restart the record is all that is known of them, and a renewal for a
// shorter term says nothing of what its holder was told before.
func (s *Store) recall(r *Record) {
	if r.Lease != nil {
		r.Lease.Until = s.until(r.Lease).UTC()
	}
}

// Restored is a volume whose record is older than what was seen of it, or gone.
type Restored struct {
	Volume string `json:"volume"`
	Seen   uint64 `json:"seen"`            // revision
	Found  uint64 `json:"found,omitempty"` // 0: no record
	State  State  `json:"state,omitempty"` // that the old record has
}

// Restored lists the volumes that storage shows in an older state.
func (s *Store) Restored(ctx context.Context) ([]Restored, error) {
	var all []Restored
	for _, v := range s.Volumes() {
		r, _, err := s.read(ctx, v)
		seen := s.Seen(v)
		switch {
		case errors.Is(err, ErrNoVolume):
			all = append(all, Restored{Volume: v, Seen: seen})
		case macstore.Foreign(err):
			continue // refused, and named by a listing
		case err != nil:
			return nil, err
		case r.Revision < seen:
			all = append(all, Restored{v, seen, r.Revision, r.State})
		}
	}
	return all, nil
}

// turns let one change of a volume happen at a time in this process.
type turns struct {
	mu  sync.Mutex
	all map[string]*turn
}

type turn struct {
	c     chan struct{}
	users int
}

func (t *turns) take(ctx context.Context, volume string) (done func(), err error) {
	t.mu.Lock()
	if t.all == nil {
		t.all = map[string]*turn{}
	}
	w := t.all[volume]
	if w == nil {
		w = &turn{c: make(chan struct{}, 1)}
		t.all[volume] = w
	}
	w.users++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if w.users--; w.users == 0 {
			delete(t.all, volume)
		}
	}
	select {
	case w.c <- struct{}{}:
		return func() { <-w.c; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}
