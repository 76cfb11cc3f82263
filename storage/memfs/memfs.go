// Package memfs is a storage in memory, for tests. It forgets everything when
// the process ends, so no URI selects it.
package memfs

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/keyagent/keyagent/storage"
)

// Storage keeps objects in a map.
type Storage struct {
	mu      sync.Mutex
	objects map[string]object
}

type object struct {
	data    []byte
	version storage.Version
}

var (
	_ storage.Storage = (*Storage)(nil)
	_ storage.Deleter = (*Storage)(nil)
)

// New returns an empty storage.
func New() *Storage { return &Storage{objects: map[string]object{}} }

// Get implements storage.Storage.
func (s *Storage) Get(ctx context.Context, name string) ([]byte, storage.Version, error) {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return nil, "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.objects[name]
	if !ok {
		return nil, "", storage.ErrNotFound
	}
	return bytes.Clone(o.data), o.version, nil
}

// Put implements storage.Storage.
func (s *Storage) Put(ctx context.Context, name string, data []byte, expect storage.Version) (storage.Version, error) {
	if err := errors.Join(ctx.Err(), storage.CheckPut(name, data)); err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.objects[name].version != expect {
		return "", storage.ErrConflict
	}
	v := storage.Version(rand.Text())
	s.objects[name] = object{bytes.Clone(data), v}
	return v, nil
}

// Delete implements storage.Deleter.
func (s *Storage) Delete(ctx context.Context, name string, expect storage.Version) error {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch o, ok := s.objects[name]; {
	case !ok:
		return storage.ErrNotFound
	case o.version != expect:
		return storage.ErrConflict
	}
	delete(s.objects, name)
	return nil
}

// List implements storage.Storage.
func (s *Storage) List(ctx context.Context, prefix, after string, limit int) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for _, name := range slices.Sorted(maps.Keys(s.objects)) {
		if strings.HasPrefix(name, prefix) && name > after && len(names) < limit {
			names = append(names, name)
		}
	}
	return names, nil
}
