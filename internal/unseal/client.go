package unseal

import (
	"context"
	"errors"
	"net"

	"google.golang.org/grpc"

	unsealv1 "github.com/keyagent/keyagent/api/keyagent/unseal/v1"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/shares"
	"github.com/keyagent/keyagent/internal/wire"
)

// Submit gives a share to the key service at an address. cfg demands what the service must
// prove; without that the share is only as safe as the service's certificate.
func Submit(ctx context.Context, address string, cfg *atls.ClientConfig, share *shares.Share) (Progress, error) {
	tcp, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return Progress{}, failure.New(failure.Unreachable, err, "does the key service run, and does this network reach it?")
	}
	conn, err := atls.Client(ctx, tcp, cfg)
	switch {
	case errors.Is(err, atls.ErrNoEvidence):
		return Progress{}, failure.New(failure.State, err, "it is unsealed: a key service that runs demands evidence")
	case errors.Is(err, atls.ErrPeerUnattested):
		return Progress{}, failure.New(failure.ServerUntrusted, err, "it proves nothing; --service-without-evidence gives it the share all the same")
	case err != nil:
		return Progress{}, failure.New(failure.ServerUntrusted, err, "is this the right service, and the right policy?")
	}
	client, err := atls.NewGRPC(conn, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.ForceCodecV2(wire.Codec())))
	if err != nil {
		return Progress{}, err
	}
	defer client.Close()
	request, err := requestOf(conn.Channel(), cfg.Server != nil, share)
	if err != nil {
		return Progress{}, err
	}
	defer secret.Wipe(request.GetShare())
	resp, err := unsealv1.NewUnsealClient(client).Submit(ctx, request)
	if err != nil {
		return Progress{}, failure.FromStatus(err)
	}
	return Progress{resp.GetSplit(), int(resp.GetThreshold()), int(resp.GetHave()), resp.GetUnsealed()}, nil
}

func requestOf(ch *atls.Channel, sealed bool, share *shares.Share) (*unsealv1.SubmitRequest, error) {
	text, err := share.Encode()
	if err != nil {
		return nil, err
	}
	defer text.Close()
	r := &unsealv1.SubmitRequest{}
	if sealed {
		r.SealedShare, err = ch.Seal(SealInfo, text)
		return r, err
	}
	return r, text.Use(func(raw []byte) error { r.Share = append(r.Share, raw...); return nil })
}
