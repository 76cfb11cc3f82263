package etcd

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/keyagent/keyagent/storage"
)

// reason is why the last request of a call failed. The SDK waits for a
// connection until the deadline, and then returns nothing but that it has passed.
type reason struct{ err error }

type reasonKey struct{}

func withReason(ctx context.Context) (context.Context, *reason) {
	r := &reason{}
	return context.WithValue(ctx, reasonKey{}, r), r
}

// keepReason is a grpc.UnaryClientInterceptor. A call makes one request after the
// other.
func keepReason(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, cc, opts...)
	// That the deadline has passed is a reason only if there was none before.
	if r, ok := ctx.Value(reasonKey{}).(*reason); ok && err != nil && (r.err == nil || status.Code(err) != codes.DeadlineExceeded) {
		r.err = err
	}
	return err
}

// explain gives an error of the SDK its class. why may be nil.
func (s *Storage) explain(what string, err error, why *reason) error {
	if err == nil {
		return nil
	}
	where := what + " etcd"
	if s.opts.Prefix != "" {
		where += " below " + s.opts.Prefix
	}
	switch class := classOf(err); {
	case class == storage.ErrDenied:
		keys := "all keys"
		if s.prefix != "" {
			keys = "the prefix " + s.prefix
		}
		return fmt.Errorf("%s: %w: readwrite on %s: %w", where, class, keys, err)
	case errors.Is(err, context.DeadlineExceeded) && why != nil && why.err != nil:
		return fmt.Errorf("%s: %w: %w: %w", where, class, err, why.err)
	case class != nil:
		return fmt.Errorf("%s: %w: %w", where, class, err)
	}
	return fmt.Errorf("%s: %w", where, err)
}

// classOf is the class of an error of the SDK, or nil.
func classOf(err error) error {
	switch {
	case errors.Is(err, context.Canceled):
		return nil
	case errors.Is(err, context.DeadlineExceeded):
		return storage.ErrUnavailable
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return storage.ErrDenied
	case errors.Is(err, rpctypes.ErrAuthFailed), errors.Is(err, rpctypes.ErrInvalidAuthToken),
		errors.Is(err, rpctypes.ErrUserEmpty), errors.Is(err, rpctypes.ErrUserNotFound):
		return storage.ErrCredentials
	case errors.Is(err, rpctypes.ErrTooManyRequests):
		return storage.ErrThrottled
	case errors.Is(err, rpctypes.ErrNoSpace):
		return storage.ErrUnavailable
	}
	switch code(err) {
	case codes.PermissionDenied:
		return storage.ErrDenied
	case codes.Unauthenticated:
		return storage.ErrCredentials
	case codes.ResourceExhausted:
		return storage.ErrThrottled
	case codes.Unavailable, codes.Internal, codes.Unknown, codes.DeadlineExceeded, codes.Aborted, codes.DataLoss:
		return storage.ErrUnavailable
	}
	return nil
}

// code is the gRPC code of an error, which the SDK has in two forms.
func code(err error) codes.Code {
	var e rpctypes.EtcdError
	if errors.As(err, &e) {
		return e.Code()
	}
	return status.Code(err)
}
