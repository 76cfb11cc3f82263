package keyservice

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/keyagent/keyagent/internal/dekrecord"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/volume"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage"
)

// ErrNoRecords: the storage holds nothing of a key service.
var ErrNoRecords = errors.New("storage holds no records")

// Admin is what an operator does with all records at once. It works beside a key
// service that runs: every change is a compare-and-swap.
type Admin struct {
	kms     kms.KMS
	records *macstore.Store
	now     func() time.Time
}

// OpenAdmin opens the records of a storage. recordKey is the ID of their MAC key,
// if it is known; it must be where anybody can wrap under the KEK.
func OpenAdmin(ctx context.Context, k kms.KMS, s storage.Storage, recordKey string) (*Admin, error) {
	return newAdmin(ctx, k, s, recordKey, macstore.OpenExisting)
}

// OpenNewAdmin is OpenAdmin for a storage that may be empty. announce is told the ID
// of a MAC key that is made for it, before it is stored.
func OpenNewAdmin(ctx context.Context, k kms.KMS, s storage.Storage, recordKey string, announce func(id string) error) (*Admin, error) {
	return newAdmin(ctx, k, s, recordKey, func(ctx context.Context, k kms.KMS, s storage.Storage) (*macstore.Store, error) {
		return macstore.Open(ctx, k, s, announce)
	})
}

func newAdmin(ctx context.Context, k kms.KMS, s storage.Storage, recordKey string, open func(context.Context, kms.KMS, storage.Storage) (*macstore.Store, error)) (*Admin, error) {
	records, err := open(ctx, k, s)
	if errors.Is(err, storage.ErrNotFound) {
		return nil, forOperator(ErrNoRecords)
	}
	if err != nil {
		return nil, forOperator(err)
	}
	if err := records.CheckKey(k, recordKey); err != nil {
		return nil, errors.Join(forOperator(err), records.Close())
	}
	return &Admin{kms: k, records: records, now: time.Now}, nil
}

// Close wipes the MAC key. The KMS and the storage are the caller's.
func (a *Admin) Close() error { return a.records.Close() }

// visits say how the records of each kind hold their keys.
func visits(now func() time.Time) map[macstore.Collection]macstore.Visit {
	return map[macstore.Collection]macstore.Visit{macstore.Volume: visitVolume(now), macstore.DEK: dekrecord.Visit}
}

func visitVolume(now func() time.Time) macstore.Visit {
	return func(id string, body []byte, f func(kms.Binding, kms.Wrapped) (kms.Wrapped, error)) ([]byte, error) {
		r, err := volume.Parse(id, body)
		if err != nil {
			return nil, err
		}
		changed := false
		for i := range r.Keys {
			k := &r.Keys[i]
			w, err := f(kms.Binding{VolumeID: id, Purpose: kms.VolumeDEK, Version: k.Version, Length: k.Length, Salt: k.Salt}, k.Wrapped)
			if err != nil {
				return nil, fmt.Errorf("key version %d: %w", k.Version, err)
			}
			// The blob too: two servers may give their KEKs one name.
			changed = changed || w.KEK != k.Wrapped.KEK || w.Scheme != k.Wrapped.Scheme || !bytes.Equal(w.Blob, k.Wrapped.Blob)
			k.Wrapped = w
		}
		if !changed {
			return body, nil
		}
		r.Revision++
		r.Updated = now().UTC()
		return r.Encode()
	}
}

// Status is what records there are, and under which KEKs.
type Status struct {
	Current   string               `json:"current_kek"`    // what keys are wrapped under now
	RecordKey string               `json:"record_key"`     // ID of the record MAC key
	MACKey    string               `json:"record_key_kek"` // the KEK that it is under
	Volumes   map[volume.State]int `json:"volumes"`        // records by state
	DEKs      int                  `json:"deks"`           // of programs without a key service
	Keys      map[string]int       `json:"keys"`           // by KEK
	Outdated  int                  `json:"outdated"`       // keys, the MAC key among them, under another KEK than Current
	Refused   []string             `json:"refused,omitempty"`
}

// Status reads every record. It unwraps nothing. Records that are refused are
// named in it.
func (a *Admin) Status(ctx context.Context) (*Status, error) {
	s := &Status{Volumes: map[volume.State]int{}, Keys: map[string]int{}}
	var err error
	if s.Current, err = kms.Current(ctx, a.kms); err != nil {
		return nil, forOperator(err)
	}
	if s.RecordKey, err = a.records.KeyID(); err != nil {
		return nil, err
	}
	mac, err := a.records.MACKey(ctx)
	if err != nil {
		return nil, forOperator(err)
	}
	s.MACKey = mac.KEK
	var mu sync.Mutex
	for _, kind := range macstore.Collections {
		visit := visits(a.now)[kind]
		look := func(id string, body []byte, f func(kms.Binding, kms.Wrapped) (kms.Wrapped, error)) ([]byte, error) {
			if _, err := visit(id, body, f); err != nil {
				return nil, err
			}
			mu.Lock()
			defer mu.Unlock()
			if kind == macstore.DEK {
				s.DEKs++
				return body, nil
			}
			r, err := volume.Parse(id, body)
			if err == nil {
				s.Volumes[r.State]++
			}
			return body, err
		}
		count := func(_ context.Context, _ kms.Binding, w kms.Wrapped) (kms.Wrapped, error) {
			mu.Lock()
			defer mu.Unlock()
			s.Keys[w.KEK]++
			return w, nil
		}
		_, err := a.records.Walk(ctx, kind, look, count, nil)
		if errors.Is(err, macstore.ErrIncomplete) {
			return nil, forOperator(err)
		}
		if err != nil {
			s.Refused = append(s.Refused, err.Error())
		}
	}
	for kek, keys := range s.Keys {
		if kek != s.Current {
			s.Outdated += keys
		}
	}
	if s.MACKey != s.Current {
		s.Outdated++
	}
	return s, nil
}
