package unseal

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"

	unsealv1 "github.com/keyagent/keyagent/api/keyagent/unseal/v1"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/shares"
	"github.com/keyagent/keyagent/internal/wire"
)

// SealInfo is what a share that is sealed to the service is authenticated with.
var SealInfo = []byte("keyagent unseal share v1")

// maxMessage bounds a request in bytes.
const maxMessage = 16 << 10

// Server takes shares on a listener.
type Server struct {
	unsealv1.UnimplementedUnsealServer
	gather  *Gatherer
	attests bool // the service has evidence, so that shares are sealed to it
	log     *slog.Logger
	allow   func() (withheld int, ok bool) // a line of the log about a stranger
}

// NewServer returns the server of a gatherer. attests says that the service proves what it is;
// allow bounds what is logged of strangers.
func NewServer(g *Gatherer, attests bool, log *slog.Logger, allow func() (withheld int, ok bool)) *Server {
	return &Server{gather: g, attests: attests, log: log, allow: allow}
}

// Nobody has to stay: an operator gives a share and goes.
const (
	idle  = 30 * time.Second
	most  = time.Minute
	grace = 5 * time.Second
)

// Serve takes shares until there are enough, and returns the master secret. All else that it is
// asked for is refused. The listener is closed.
func (s *Server) Serve(ctx context.Context, l net.Listener, cfg *atls.ServerConfig) (*secret.Bytes, error) {
	g := grpc.NewServer(
		grpc.Creds(atls.NewServerCredentials(cfg)), grpc.ForceServerCodecV2(wire.Codec()), grpc.ConnectionTimeout(cfg.Timeout),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxConcurrentStreams(4), grpc.MaxHeaderListSize(16<<10), grpc.UnknownServiceHandler(sealed),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idle, MaxConnectionAge: most, MaxConnectionAgeGrace: grace}),
	)
	// A stranger's call that does not end does not keep a service that is unsealed from serving,
	// nor one that is to stop from stopping.
	defer g.Stop()
	defer context.AfterFunc(ctx, g.Stop)()
	unsealv1.RegisterUnsealServer(g, s)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case master := <-s.gather.Opened():
			defer time.AfterFunc(grace, g.Stop).Stop()
			g.GracefulStop() // the last operator hears of it
			return master, nil
		case err := <-served:
			return nil, err
		case <-ctx.Done():
			g.Stop()
			return nil, ctx.Err()
		case <-tick.C:
			if n := s.gather.Expire(); n > 0 {
				s.log.Warn("shares waited for others for too long, and are forgotten", "shares", n)
			}
		}
	}
}

// sealed answers all that a key service is asked for, so that who asks tries again.
func sealed(any, grpc.ServerStream) error {
	return failure.Status(failure.New(failure.Unreachable, errSealed, "its operators have to give their shares: keyagent kms unseal"), errSealed.Error())
}

var errSealed = errors.New("the key service is sealed")

func answer(p Progress) *unsealv1.SubmitResponse {
	return &unsealv1.SubmitResponse{Split: p.Split, Threshold: uint32(p.Threshold), Have: uint32(p.Have), Unsealed: p.Unsealed}
}

// Submit implements the service.
func (s *Server) Submit(ctx context.Context, r *unsealv1.SubmitRequest) (*unsealv1.SubmitResponse, error) {
	remote := ""
	if p, ok := peer.FromContext(ctx); ok {
		remote = p.Addr.String()
	}
	share, err := s.share(ctx, r)
	var p Progress
	if err == nil {
		index := share.Index
		p, err = s.gather.Give(share)
		if err == nil {
			s.log.Info("a share was given", "share", index, "have", p.Have, "needed", p.Threshold, "unsealed", p.Unsealed, "remote", remote)
			return answer(p), nil
		}
	}
	if withheld, ok := s.allow(); ok {
		s.log.Warn("a share was refused", "remote", remote, "error", err, "withheld", withheld)
	}
	class, hint := failure.WrongKey, "is it of this split, and as it was made?"
	switch {
	case errors.Is(err, ErrDone):
		class, hint = failure.State, "nothing more is needed"
	case errors.Is(err, shares.ErrFormat), errors.Is(err, errHow):
		class, hint = failure.Usage, ""
	case errors.Is(err, atls.ErrSealed):
		class, hint = failure.WrongKey, "it was sealed for another service"
	}
	return nil, failure.Status(failure.New(class, err, hint), err.Error())
}

var errHow = errors.New("a share comes sealed to a service that proves what it is, and only there")

// share opens what was submitted.
func (s *Server) share(ctx context.Context, r *unsealv1.SubmitRequest) (*shares.Share, error) {
	if (len(r.GetSealedShare()) > 0) == (len(r.GetShare()) > 0) || s.attests != (len(r.GetSealedShare()) > 0) {
		secret.Wipe(r.GetShare())
		return nil, errHow
	}
	var text *secret.Bytes
	var err error
	if s.attests {
		ch, ok := atls.FromContext(ctx)
		if !ok {
			return nil, errHow
		}
		text, err = ch.Open(SealInfo, r.GetSealedShare())
	} else {
		text, err = secret.From(r.GetShare())
	}
	if err != nil {
		return nil, err
	}
	defer text.Close()
	return shares.ParseShare(text)
}
