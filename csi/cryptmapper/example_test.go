package cryptmapper_test

import (
	"context"
	"fmt"
	"os"

	"github.com/keyagent/keyagent/csi/cryptmapper"
)

// A driver stages a volume, grows it and lets it go. The agent here stands in for the one
// of a node, which listens on [cryptmapper.DefaultSocket].
func Example() {
	dir, err := os.MkdirTemp("", "csi")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	socket, _, stop, err := serve(dir)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer stop()

	mapper, err := cryptmapper.Dial(socket, cryptmapper.Options{Create: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer mapper.Close()
	ctx := context.Background()
	fmt.Println(mapper.OpenCryptDevice(ctx, "/dev/disk/by-id/pvc-7f", "pvc-7f", false))
	fmt.Println(mapper.ResizeCryptDevice(ctx, "pvc-7f"))
	fmt.Println(mapper.GetDevicePath("pvc-7f"))
	fmt.Println(mapper.CloseCryptDevice("pvc-7f"))
	// Output:
	// /dev/mapper/pvc-7f <nil>
	// /dev/mapper/pvc-7f <nil>
	// /dev/disk/by-id/pvc-7f <nil>
	// <nil>
}
