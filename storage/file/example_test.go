package file_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/file"
)

// An object is durable when Put returns, and outlives the process.
func ExampleOpen() {
	parent, err := os.MkdirTemp("", "storage")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(parent)
	ctx := context.Background()
	dir := filepath.Join(parent, "records") // is made
	s, err := file.Open(dir)
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = s.Put(ctx, "volumes/data", []byte("record"), storage.Absent)
	if err := errors.Join(err, s.Close()); err != nil {
		fmt.Println(err)
		return
	}
	again, err := file.Open(dir)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer again.Close()
	data, _, err := again.Get(ctx, "volumes/data")
	fmt.Println(string(data), err)
	// Output: record <nil>
}
