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
// does for disks, call [Store.Get] for a volume that exists, which never makes a
// key; or run the key service, whose records know.
package dek

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage"
)

var (
	// ErrNotFound: the volume has no key.
	ErrNotFound = errors.New("volume has no key")
	// ErrLength: the volume's key has another length than was asked for.
	ErrLength = errors.New("key has another length")
	// ErrNoStorage: the KMS does not derive keys, so that without a storage
	// they would be lost.
	ErrNoStorage = errors.New("this key management backend needs a storage for wrapped keys")
	// ErrRefused: what storage holds is not what was stored under this name.
	ErrRefused = macstore.ErrRefused
	// ErrMACKey: the key that authenticates the storage is gone or was
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

// stored is the body of an object.
type stored struct {
	ID      string      `json:"id"`
	Version uint32      `json:"version"`
	Length  int         `json:"length"`
	Wrapped kms.Wrapped `json:"wrapped"`
}

func (d *stored) binding() kms.Binding {
	return kms.Binding{VolumeID: d.ID, Purpose: kms.VolumeDEK, Version: d.Version, Length: d.Length}
}

// GetDEK returns the key of a volume, of length bytes, [kms.MinLength] to
// [kms.MaxLength]. It makes one if there is none; of several first callers all get
// the same. The caller closes it.
func (s *Store) GetDEK(ctx context.Context, id string, length int) (*kms.Secret, error) {
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

// maxTries bounds how often a key is made against other writers. Storage that says
// in turn that there is none and that there is one lies.
const maxTries = 16

// Get returns the key of a volume that has one, else [ErrNotFound].
func (s *Store) Get(ctx context.Context, id string, length int) (*kms.Secret, error) {
	if s.records == nil {
		return s.GetDEK(ctx, id, length)
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
	var d *stored
	if err == nil {
		d, err = parse(id, body)
	}
	if err != nil {
		return nil, fmt.Errorf("key of %q: %w", id, err)
	}
	if d.Length != length {
		return nil, fmt.Errorf("key of %q: %w: %d bytes, not %d", id, ErrLength, d.Length, length)
	}
	key, err := s.kms.Unwrap(ctx, d.binding(), d.Wrapped)
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
	body, err := json.Marshal(&stored{b.VolumeID, b.Version, b.Length, w})
	if err != nil {
		return err
	}
	return s.records.Put(ctx, macstore.DEK, b.VolumeID, body, storage.Absent)
}

// parse parses a body that the MAC vouches for, strictly: it must be what
// encoding the result gives again.
func parse(id string, body []byte) (*stored, error) {
	d := &stored{}
	if err := json.Unmarshal(body, d); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	again, err := json.Marshal(d)
	switch {
	case err != nil || !bytes.Equal(again, body):
		return nil, fmt.Errorf("%w: not in canonical form", ErrRefused)
	case d.ID != id:
		return nil, fmt.Errorf("%w: it is of volume %q", ErrRefused, d.ID)
	}
	if err := d.binding().Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return d, nil
}

// Visit is the [macstore.Visit] of this package's records.
func Visit(id string, body []byte, f func(kms.Binding, kms.Wrapped) (kms.Wrapped, error)) ([]byte, error) {
	d, err := parse(id, body)
	if err != nil {
		return nil, err
	}
	if d.Wrapped, err = f(d.binding(), d.Wrapped); err != nil {
		return nil, err
	}
	return json.Marshal(d)
}
