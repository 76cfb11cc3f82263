package etcd_test

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/storage/etcd"
)

// New asks the cluster at once. What cannot be right is refused before.
func ExampleNew() {
	_, err := etcd.New(context.Background(), etcd.Options{Endpoints: []string{"http://10.0.0.7:2379"}})
	fmt.Println(err)
	// Output: the endpoint must be https, or http on a loopback address such as 127.0.0.1
}
