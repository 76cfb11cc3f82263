package kubekms

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"k8s.io/kms/apis/v2"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

const (
	// maxRequest bounds a request: the longest ciphertext, and annotations as long
	// as kube-apiserver allows, which are then refused in words.
	maxRequest = MaxCiphertextV1 + 34<<10
	// stopTimeout bounds how long requests under way may still take.
	stopTimeout = 5 * time.Second
	// healthInterval is how often gRPC's health follows the state.
	healthInterval = time.Second
)

// ServerOptions configure [NewServer].
type ServerOptions struct {
	Ring    *Ring
	UIDs    []uint32 // who may call. Nobody, if it is empty
	Version string   // that v1beta1 tells, a semantic version
	Log     *slog.Logger
	Metrics *Metrics
}

// Server answers kube-apiserver.
type Server struct {
	opts   ServerOptions
	grpc   *grpc.Server
	health *health.Server
	names  []string // of the services, for health
}

// NewServer returns a server that does not listen yet.
func NewServer(opts ServerOptions) *Server {
	s := &Server{opts: opts, health: health.NewServer()}
	s.grpc = grpc.NewServer(
		grpc.Creds(unixsocket.Credentials(s.admit)),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxConcurrentStreams(1000),
		grpc.ConnectionTimeout(10*time.Second),
	)
	q := &requests{opts.Ring, opts.Log, opts.Metrics}
	v2.RegisterKeyManagementServiceServer(s.grpc, &serviceV2{requests: q})
	s.names = []string{"", v2.KeyManagementService_ServiceDesc.ServiceName, registerV1(s.grpc, q, opts.Version)}
	healthv1.RegisterHealthServer(s.grpc, s.health)
	s.showHealth()
	return s
}

// admit decides by the kernel's word on the caller.
func (s *Server) admit(p unixsocket.Peer) error {
	if slices.Contains(s.opts.UIDs, p.UID) {
		return nil
	}
	s.opts.Metrics.refused()
	s.opts.Log.Warn("caller refused", "uid", p.UID, "pid", p.PID)
	return failure.Newf(failure.PolicyDenied, "", "uid %d may not call", p.UID)
}

func (s *Server) showHealth() {
	st := healthv1.HealthCheckResponse_NOT_SERVING
	if s.opts.Ring.Health().OK() {
		st = healthv1.HealthCheckResponse_SERVING
	}
	for _, name := range s.names {
		s.health.SetServingStatus(name, st)
	}
}

// Run answers until ctx ends; requests under way are then finished.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := s.grpc.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
			return err
		}
		return nil
	})
	group.Go(func() error {
		t := time.NewTicker(healthInterval)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				s.showHealth()
			case <-ctx.Done():
				s.health.Shutdown()
				force := time.AfterFunc(stopTimeout, s.grpc.Stop)
				defer force.Stop()
				s.grpc.GracefulStop()
				return nil
			}
		}
	})
	return group.Wait()
}
