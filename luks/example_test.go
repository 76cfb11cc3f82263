package luks_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/keyagent/keyagent/luks"
)

// The key and the MACs of the header come from the key service; the device is the
// host's, and nothing on it is believed before its MAC is.
func ExampleOpen() {
	dek, err := luks.NewKey([]byte("0123456789abcdef0123456789abcdef"))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer dek.Close()
	ctx := context.Background()
	id := luks.Identity{Volume: "data", UUID: "d02c4966-a638-425d-bb5c-bac748d9e6de", Generation: 1}
	h, err := luks.NewHeader(ctx, id, luks.Layout{}, dek) // in memory, once in a volume's life
	if err != nil {
		fmt.Println(err)
		return
	}
	device, err := plainFile()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.Remove(device)
	err = luks.Write(ctx, luks.WriteRequest{Device: device, Identity: id, Header: h, Until: luks.DeadlineIn(time.Minute)}, dek)
	fmt.Println(errors.Is(err, luks.ErrNotBlockDevice))
	_, _, err = luks.Open(ctx, luks.OpenRequest{Device: device, Name: "data", Identity: id, MACs: h.MACs()}, dek)
	fmt.Println(errors.Is(err, luks.ErrNotBlockDevice))
	// Output:
	// true
	// true
}

// plainFile stands for a disk: an example has none. It is refused as what it is.
func plainFile() (string, error) {
	f, err := os.CreateTemp("", "disk")
	if err != nil {
		return "", err
	}
	return f.Name(), errors.Join(f.Truncate(32<<20), f.Close())
}
