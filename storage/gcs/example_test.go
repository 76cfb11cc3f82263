package gcs_test

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/storage/gcs"
)

// New looks for the bucket at once. What cannot be right is refused before.
func ExampleNew() {
	_, err := gcs.New(context.Background(), gcs.Options{Bucket: "records", CreateBucket: true})
	fmt.Println(err)
	// Output: a bucket can only be made in a project that is named
}
