package luks_test

import (
	"context"
	"log"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/luks"
)

// A volume's key and the MACs of its header come from the key service; the device is the
// host's, and nothing on it is believed before its MAC is.
func ExampleOpen() {
	ctx := context.Background()
	var dek *secret.Bytes
	var macs luks.MACs
	mapping, _, err := luks.Open(ctx, luks.OpenRequest{
		Device:   "/dev/disk/by-id/virtio-data",
		Name:     "data",
		Identity: luks.Identity{Volume: "data", Generation: 1, UUID: "d02c4966-a638-425d-bb5c-bac748d9e6de"},
		MACs:     macs,
	}, dek)
	if err != nil {
		log.Fatal(err)
	}
	log.Print(mapping.Name)
}
