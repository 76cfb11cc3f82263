package keyclient

import (
	"context"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/internal/proof"
)

// RotationStep is how far this node is with the change of a volume's key. The zero value
// is nowhere.
type RotationStep int

// The steps, each of which may be repeated.
const (
	RotationBegins RotationStep = iota + 1 // the next header is about to be written beside the present one
	RotationStands                         // it is on the disk, whole
	RotationDone                           // it took the present one's place
)

var rotationSteps = map[RotationStep]struct {
	step  keyservicev1.RotationStep
	proof string
}{
	RotationBegins: {keyservicev1.RotationStep_ROTATION_STEP_BEGIN, proof.RotateBegin},
	RotationStands: {keyservicev1.RotationStep_ROTATION_STEP_STANDS, proof.RotateStands},
	RotationDone:   {keyservicev1.RotationStep_ROTATION_STEP_DONE, proof.RotateDone},
}

// Rotate tells the key service how far the change of a volume's key is. k is the key that
// the volume is to have, by [Request.Rotate] or [Request.Next], with the lease that came with
// it, and m are the MACs of the next header.
func (c *Client) Rotate(ctx context.Context, k *Key, step RotationStep, m MACs) error {
	s := rotationSteps[step]
	var lease []byte
	if k.Lease != nil {
		lease = k.Lease.ID
	}
	sum, err := k.proof(s.proof, lease, m)
	if err != nil {
		return err
	}
	err = k.inSession(ctx, func(ctx context.Context) error {
		_, err := k.session.service.RotateKey(ctx, &keyservicev1.RotateKeyRequest{
			VolumeId: k.Volume, LeaseId: lease, Step: s.step, Generation: k.Generation, KeyVersion: k.KeyVersion,
			HeaderMac: m.Header[:], CopyMacs: m.copies(), Proof: sum,
		})
		return err
	})
	if err == nil {
		k.MACs = m
	}
	return err
}

func rotates(req *keyservicev1.GetKeyRequest) bool {
	op := req.GetOperation()
	return op == keyservicev1.Operation_OPERATION_ROTATE || op == keyservicev1.Operation_OPERATION_NEXT
}
