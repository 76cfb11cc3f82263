package keyclient

import (
	"context"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
)

// Retire ends the life of a volume, and returns the LUKS UUID of the header that is to be
// erased, and whether the storage may still have earlier versions of the record. lease is of
// a lease that this machine may still have. Repeating it is fine.
func (c *Client) Retire(ctx context.Context, volume string, lease []byte) (uuid string, kept bool, err error) {
	err = c.try(ctx, func(ctx context.Context) error {
		return c.leases.call(ctx, func(ctx context.Context, s *session) error {
			resp, err := s.service.RetireVolume(ctx, &keyservicev1.RetireVolumeRequest{VolumeId: volume, LeaseId: lease})
			uuid, kept = resp.GetLuksUuid(), resp.GetRecordKept()
			return fromStatus(err)
		})
	})
	return uuid, kept, err
}
