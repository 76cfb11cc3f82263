// Package dek gives each volume its data-encryption key: the one call for a
// program that has a KMS and a storage, and no key service between.
//
// A key is made at the first call for its volume, and the same one comes back at
// each later call, from any number of processes over the same storage. A KMS that
// derives keys needs no storage. One that wraps them does: the wrapped key lies in
// an object of its own, authenticated by a MAC, so that anyone who can write the
// storage can lose it but not exchange it. docs/spec/volume-record.md specifies
// the object.
//
// A [Store] does not know whether a volume holds data. Where that matters, and it
// does for disks, call [Store.Get] for a volume that exists, which never makes a key,
// and [Store.GetOrCreate] for a new one; or run the key service, whose records know.
package dek

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/keyagent/keyagent/internal/dekrecord"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage"
)

var (
	// ErrNotFound means that the volume has no key.
	ErrNotFound = errors.New("volume has no key")
	// ErrLength means that the volume's key has another length than was asked for.
	ErrLength = errors.New("key has another length")
	// ErrNoStorage means that the KMS does not derive keys, so that without a storage
	// they would be lost.
	ErrNoStorage = errors.New("this key management backend needs a storage for wrapped keys")
	// ErrRefused means that what storage holds is not what was stored under this name.
	ErrRefused = macstore.ErrRefused
	// ErrMACKey means that the key that authenticates the storage is gone or was
	// exchanged.
	ErrMACKey = macstore.ErrMACKey
)

// Store gives out keys. It is safe for concurrent use, also by several processes.
type Store struct {
	kms     kms.KMS
	storage storage.Storage
	records *macstore.Store
}

// Open returns a Store over a KMS and a storage. A nil storage is for a KMS that
// derives keys. The Store owns neither of them until it is returned, and both
// afterwards: Close closes those that can be closed.
func Open(ctx context.Context, k kms.KMS, s storage.Storage) (*Store, error) {
	out := &Store{kms: k, storage: s}
	if s == nil {
		return out, nil
	}
	records, err := macstore.Open(ctx, k, s, nil)
	if err != nil {
		return nil, err
	}
	out.records = records
	return out, nil
}

// Close wipes what the Store holds, and closes its KMS and storage.
func (s *Store) Close() error {
	var errs []error
	if s.records != nil {
		errs = append(errs, s.records.Close())
	}
	for _, part := range []any{s.kms, s.storage} {
		if c, ok := part.(io.Closer); ok {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// GetOrCreate returns the key of a volume, of length bytes, [kms.MinLength] to
// [kms.MaxLength]. It makes one if there is none; of several first callers all get
// the same. The caller closes it.
func (s *Store) GetOrCreate(ctx context.Context, id string, length int) (*kms.Secret, error) {
	b := kms.Binding{VolumeID: id, Purpose: kms.VolumeDEK, Version: 1, Length: length}
	if err := b.Validate(); err != nil {
		return nil, err
	}
	if s.records == nil {
		return s.derive(ctx, b)
	}
	var err error
	for range maxTries {
		key, missing := s.get(ctx, id, length)
		if !errors.Is(missing, ErrNotFound) {
			return key, missing
		}
		if err = s.create(ctx, b); err != nil && !errors.Is(err, storage.ErrConflict) {
			break
		}
	}
	return nil, fmt.Errorf("key of %q: %w", id, errors.Join(err, ctx.Err()))
}

// maxTries bounds how often a key is made against other writers. Storage that
// alternates between not found and conflict is broken.
const maxTries = 16

// Get returns the key of a volume that has one, else [ErrNotFound]. A Store without
// storage derives the key of any volume, and cannot say which have one.
func (s *Store) Get(ctx context.Context, id string, length int) (*kms.Secret, error) {
	if s.records == nil {
		return s.GetOrCreate(ctx, id, length)
	}
	b := kms.Binding{VolumeID: id, Purpose: kms.VolumeDEK, Version: 1, Length: length}
	if err := b.Validate(); err != nil {
		return nil, err
	}
	return s.get(ctx, id, length)
}

// derive is for a Store without storage.
func (s *Store) derive(ctx context.Context, b kms.Binding) (*kms.Secret, error) {
	key, w, err := s.kms.Generate(ctx, b)
	if err != nil {
		return nil, err
	}
	if len(w.Blob) != 0 {
		return nil, errors.Join(ErrNoStorage, key.Close())
	}
	return key, nil
}

// get opens the stored form, and nothing else: a key that cannot come back is
// never given out.
func (s *Store) get(ctx context.Context, id string, length int) (*kms.Secret, error) {
	body, _, err := s.records.Get(ctx, macstore.DEK, id)
	if errors.Is(err, storage.ErrNotFound) {
		return nil, fmt.Errorf("%w: %q", ErrNotFound, id)
	}
	var d *dekrecord.Record
	if err == nil {
		d, err = dekrecord.Parse(id, body)
	}
	if err != nil {
		return nil, fmt.Errorf("key of %q: %w", id, err)
	}
	if d.Length != length {
		return nil, fmt.Errorf("key of %q: %w: %d bytes, not %d", id, ErrLength, d.Length, length)
	}
	key, err := s.kms.Unwrap(ctx, d.Binding(), d.Wrapped)
	if err != nil {
		return nil, fmt.Errorf("key of %q: %w", id, err)
	}
	return key, nil
}

func (s *Store) create(ctx context.Context, b kms.Binding) error {
	key, w, err := s.kms.Generate(ctx, b)
	if err != nil {
		return err
	}
	if err := key.Close(); err != nil {
		return err
	}
	body, err := dekrecord.New(b, w)
	if err != nil {
		return err
	}
	return s.records.Put(ctx, macstore.DEK, b.VolumeID, body, storage.Absent)
}
