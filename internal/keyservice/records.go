package keyservice

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/keyagent/keyagent/internal/record"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage"
)

var (
	// ErrNoVolume: the volume has no record.
	ErrNoVolume = errors.New("volume does not exist")
	// ErrRollback: storage shows less than this key service has seen.
	ErrRollback = errors.New("storage went back to an older state")
	// ErrOwner: the volume was made under another grant.
	ErrOwner = errors.New("volume belongs to another grant")
	// ErrConfirm: a confirmation does not fit the record.
	ErrConfirm = errors.New("confirmation does not fit the volume")
)

// dekLength of a volume, in bytes.
const dekLength = 32

// records are the volume records in storage.
type records struct {
	kms  kms.KMS
	book *record.Book
	now  func() time.Time

	mu   sync.Mutex
	seen map[string]uint64 // highest revision by volume, from the audit log and since
}

func openRecords(ctx context.Context, k kms.KMS, s storage.Storage, now func() time.Time, announce func(id string) error) (*records, error) {
	book, err := record.Open(ctx, k, s, announce)
	if err != nil {
		return nil, err
	}
	return &records{kms: k, book: book, now: now, seen: map[string]uint64{}}, nil
}

// Close wipes the MAC key.
func (r *records) Close() error { return r.book.Close() }

// noteRevision remembers what was seen of a volume.
func (r *records) noteRevision(volume string, revision uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen[volume] = max(r.seen[volume], revision)
}

func (r *records) lastSeen(volume string) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen[volume]
}

// get returns the record of a volume. A volume that was seen and has no record
// now, or an older one, is never taken for a new one.
func (r *records) get(ctx context.Context, volume string) (*Record, storage.Version, error) {
	// What was seen before the read: a change that lands during it is newer than
	// what is read, and no rollback.
	seen := r.lastSeen(volume)
	body, version, err := r.book.Get(ctx, record.Volume, volume)
	if errors.Is(err, storage.ErrNotFound) {
		if seen > 0 {
			return nil, "", fmt.Errorf("%w: volume %q is gone, its revision %d was seen", ErrRollback, volume, seen)
		}
		return nil, "", ErrNoVolume
	}
	var rec *Record
	if err == nil {
		rec, err = parseRecord(body)
	}
	if err != nil {
		return nil, "", fmt.Errorf("record of %q: %w", volume, err)
	}
	if rec.VolumeID != volume {
		return nil, "", fmt.Errorf("%w: it is of volume %q, not %q", ErrRecord, rec.VolumeID, volume)
	}
	if rec.Revision < seen {
		return nil, "", fmt.Errorf("%w: volume %q has revision %d, %d was seen", ErrRollback, volume, rec.Revision, seen)
	}
	r.noteRevision(volume, rec.Revision)
	return rec, version, nil
}

func (r *records) put(ctx context.Context, rec *Record, expect storage.Version) error {
	body, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	if err := r.book.Put(ctx, record.Volume, rec.VolumeID, body, expect); err != nil {
		return fmt.Errorf("record of %q: %w", rec.VolumeID, err)
	}
	r.noteRevision(rec.VolumeID, rec.Revision)
	return nil
}

// maxConflicts bounds how often a change is tried against other writers.
const maxConflicts = 16

// obtain returns the record of a volume and makes it, pending, if there is none.
// Whoever loses the race to make it gets the winner's.
func (r *records) obtain(ctx context.Context, volume, owner string) (*Record, error) {
	for range maxConflicts {
		rec, _, err := r.get(ctx, volume)
		if !errors.Is(err, ErrNoVolume) {
			return rec, err
		}
		if rec, err = r.create(ctx, volume, owner); !errors.Is(err, storage.ErrConflict) {
			return rec, err
		}
	}
	return nil, fmt.Errorf("record of %q: %w", volume, storage.ErrConflict)
}

func (r *records) create(ctx context.Context, volume, owner string) (*Record, error) {
	b := kms.Binding{VolumeID: volume, Purpose: kms.VolumeDEK, Version: 1, Length: dekLength}
	key, w, err := r.kms.Generate(ctx, b)
	if err != nil {
		return nil, err
	}
	// Only the stored form counts: the key is unwrapped from it when it is
	// released, so that one that cannot come back is never used.
	if err := key.Close(); err != nil {
		return nil, err
	}
	id, err := uuid.NewRandom()
	if err != nil {
		return nil, err
	}
	now := r.now().UTC()
	rec := &Record{
		VolumeID: volume, Generation: 1, Owner: owner, LUKSUUID: id.String(), KeyVersion: b.Version,
		Keys: []WrappedDEK{{b.Version, b.Length, w}}, Created: now,
	}
	if err := rec.to(Pending, now); err != nil {
		return nil, err
	}
	return rec, r.put(ctx, rec, storage.Absent)
}

// confirm makes a pending volume active. Confirming an active volume with the
// same header again is fine: the first answer may have been lost.
func (r *records) confirm(ctx context.Context, volume string, generation uint64, keyVersion uint32, headerMAC []byte) (*Record, error) {
	if len(headerMAC) != 32 {
		return nil, fmt.Errorf("%w: header MAC of %d bytes", ErrConfirm, len(headerMAC))
	}
	text := hex.EncodeToString(headerMAC)
	for range maxConflicts {
		rec, version, err := r.get(ctx, volume)
		if err != nil {
			return nil, err
		}
		switch {
		case rec.Generation != generation || rec.KeyVersion != keyVersion:
			return nil, fmt.Errorf("%w: generation %d and key version %d, the record has %d and %d", ErrConfirm,
				generation, keyVersion, rec.Generation, rec.KeyVersion)
		case rec.State == Active && rec.HeaderMAC == text:
			return rec, nil
		case rec.State == Active:
			return nil, fmt.Errorf("%w: it is active with another header", ErrConfirm)
		}
		if err := rec.to(Active, r.now()); err != nil {
			return nil, err
		}
		rec.HeaderMAC = text
		if err := r.put(ctx, rec, version); !errors.Is(err, storage.ErrConflict) {
			return rec, err
		}
	}
	return nil, fmt.Errorf("record of %q: %w", volume, storage.ErrConflict)
}
