// Package setuptest opens what URIs name for the tests of programs that use the
// library. Besides the storages of package setup it knows one that no program can
// choose, because it forgets everything:
//
//	storage://memory            in this test's memory
//	storage://memory?name=other another one
package setuptest

import (
	"sync"
	"testing"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/dek"
	"github.com/keyagent/keyagent/kms/setup"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/memfs"
)

// Memory is the name of the storage in memory.
const Memory = "memory"

// memories are those of each running test.
var memories struct {
	sync.Mutex
	of map[testing.TB]map[string]storage.Storage
}

// DEKs is [setup.DEKs] with storage://memory. The same test gets the same memory
// again, as a program that starts again does; another test gets another. Keys are
// given back when the test ends.
func DEKs(t testing.TB, kmsURI, storageURI string) (*dek.Store, error) {
	t.Helper()
	u, err := kms.ParseURI(storageURI)
	if err != nil {
		return nil, err
	}
	if u.Scheme != "storage" || u.Name != Memory {
		return closing(t)(setup.DEKs(t.Context(), kmsURI, storageURI))
	}
	name := u.Optional("name")
	if err := u.Done(); err != nil {
		return nil, err
	}
	k, err := setup.KMS(t.Context(), kmsURI)
	if err != nil {
		return nil, err
	}
	d, err := dek.Open(t.Context(), k, memory(t, name))
	if err != nil {
		k.Close()
		return nil, err
	}
	return closing(t)(d, nil)
}

func closing(t testing.TB) func(*dek.Store, error) (*dek.Store, error) {
	return func(d *dek.Store, err error) (*dek.Store, error) {
		if err == nil {
			t.Cleanup(func() { d.Close() })
		}
		return d, err
	}
}

func memory(t testing.TB, name string) storage.Storage {
	memories.Lock()
	defer memories.Unlock()
	all := memories.of[t]
	if all == nil {
		if memories.of == nil {
			memories.of = map[testing.TB]map[string]storage.Storage{}
		}
		all = map[string]storage.Storage{}
		memories.of[t] = all
		t.Cleanup(func() {
			memories.Lock()
			defer memories.Unlock()
			delete(memories.of, t)
		})
	}
	if all[name] == nil {
		all[name] = memfs.New()
	}
	return all[name]
}
