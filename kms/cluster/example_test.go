package cluster_test

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/cluster"
)

// A master secret gives each volume a key of its own, and the same one each time.
func Example() {
	master, err := kms.NewSecret([]byte("0123456789abcdef0123456789abcdef"))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer master.Close()
	k, err := cluster.New(cluster.Options{MasterSecret: master})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer k.Close()
	binding := kms.Binding{VolumeID: "pvc-8f2a", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	first, _, err := k.Generate(context.Background(), binding)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer first.Close()
	again, _, err := k.Generate(context.Background(), binding)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer again.Close()
	fmt.Println(first, first.Len(), first.Equal(again))
	// Output: [secret] 32 true
}
