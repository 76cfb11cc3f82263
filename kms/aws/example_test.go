package aws_test

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/kms/aws"
)

// New asks the service for the key at once. What cannot be right is refused before.
func ExampleNew() {
	_, err := aws.New(context.Background(), aws.Options{
		Key:    "arn:aws:kms:eu-central-1:111122223333:alias/disks",
		Region: "us-east-1",
	})
	fmt.Println(err)
	// Output: the key is of region eu-central-1, the service of us-east-1
}
