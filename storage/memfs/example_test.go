package memfs_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/memfs"
)

// An object is replaced by those who saw it as it is.
func Example() {
	ctx := context.Background()
	s := memfs.New()
	first, err := s.Put(ctx, "volumes/data", []byte("one"), storage.Absent)
	if err != nil {
		fmt.Println(err)
		return
	}
	if _, err := s.Put(ctx, "volumes/data", []byte("two"), first); err != nil {
		fmt.Println(err)
		return
	}
	_, err = s.Put(ctx, "volumes/data", []byte("late"), first)
	fmt.Println(errors.Is(err, storage.ErrConflict))
	data, _, err := s.Get(ctx, "volumes/data")
	fmt.Println(string(data), err)
	// Output:
	// true
	// two <nil>
}
