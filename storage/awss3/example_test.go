package awss3_test

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/storage/awss3"
)

// New looks for the bucket at once. What cannot be right is refused before.
func ExampleNew() {
	_, err := awss3.New(context.Background(), awss3.Options{Bucket: "records--euc1-az1--x-s3", Region: "eu-central-1"})
	fmt.Println(err)
	// Output: directory buckets do not list in order and cannot be used
}
