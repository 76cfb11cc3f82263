package storage_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/memfs"
)

// update changes an object that others may change at the same time.
func update(ctx context.Context, s storage.Storage, name string, change func([]byte) []byte) error {
	for {
		data, version, err := s.Get(ctx, name)
		if errors.Is(err, storage.ErrNotFound) {
			data, version, err = nil, storage.Absent, nil
		}
		if err != nil {
			return err
		}
		if _, err = s.Put(ctx, name, change(data), version); !errors.Is(err, storage.ErrConflict) {
			return err
		}
	}
}

// Every backend replaces an object only in the version that the writer saw.
func ExampleStorage() {
	ctx := context.Background()
	s := memfs.New()
	for _, word := range []string{"one", " two"} {
		if err := update(ctx, s, "volumes/data", func(b []byte) []byte { return append(b, word...) }); err != nil {
			fmt.Println(err)
			return
		}
	}
	data, _, err := s.Get(ctx, "volumes/data")
	fmt.Println(string(data), err)
	// Output: one two <nil>
}
