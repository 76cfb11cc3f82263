package gcp

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/googleapis/gax-go/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/keyagent/keyagent/kms"
)

// operation is one of the calls, with the permission that it needs.
type operation struct{ name, permission string }

var (
	encrypt = operation{"encrypt", "cloudkms.cryptoKeyVersions.useToEncrypt"}
	decrypt = operation{"decrypt", "cloudkms.cryptoKeyVersions.useToDecrypt"}
	get     = operation{"get", "cloudkms.cryptoKeys.get"}
)

// maxReply bounds an answer in bytes.
const maxReply = 256 << 10

// bounded gives up after a number of attempts.
type bounded struct {
	gax.Retryer
	left int
}

func (b *bounded) Retry(err error) (time.Duration, bool) {
	if b.left--; b.left <= 0 {
		return 0, false
	}
	return b.Retryer.Retry(err)
}

// callOptions try again what may go well later. All of the calls may be
// repeated: none changes anything.
func (k *KMS) callOptions() []gax.CallOption {
	return []gax.CallOption{
		gax.WithGRPCOptions(grpc.MaxCallRecvMsgSize(maxReply)),
		gax.WithRetry(func() gax.Retryer {
			return &bounded{left: k.opts.Attempts, Retryer: gax.OnCodes(
				[]codes.Code{codes.Unavailable, codes.Internal, codes.ResourceExhausted},
				gax.Backoff{Initial: 100 * time.Millisecond, Max: 5 * time.Second, Multiplier: 2})}
		}),
	}
}

func damaged(op operation) error {
	return fmt.Errorf("gcp kms: %s: %w: damaged on the way, its checksums do not match", op.name, kms.ErrUnavailable)
}

// explain gives an error of the SDK its class. ctx is the caller's, without our
// own timeout.
func (k *KMS) explain(ctx context.Context, op operation, key string, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("gcp kms: %s: %w", op.name, context.Canceled)
	}
	s, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("gcp kms: %s: %w: %w", op.name, kms.ErrUnavailable, err)
	}
	// The service's own words, bounded.
	why := s.Message()
	why = s.Code().String() + ": " + why[:min(len(why), 256)]
	class := kms.ErrUnavailable
	switch s.Code() {
	case codes.PermissionDenied:
		return fmt.Errorf("gcp kms: %s: %w: %s on %s: %s", op.name, kms.ErrDenied, op.permission, key, why)
	case codes.DeadlineExceeded:
		return fmt.Errorf("gcp kms: %s: %w: %w: %s", op.name, class, context.DeadlineExceeded, why)
	case codes.Unauthenticated:
		class = kms.ErrCredentials
	case codes.NotFound, codes.FailedPrecondition:
		class = kms.ErrKEK
	case codes.ResourceExhausted:
		class = kms.ErrThrottled
	case codes.InvalidArgument:
		switch {
		case strings.Contains(strings.ToLower(why), "crc32c"):
			// It is how the service says that a request was damaged, and there
			// is no code of its own for it. The wrapped key may be sound.
			return damaged(op)
		case op == decrypt:
			class = kms.ErrWrongKey
		default:
			class = kms.ErrKEK // nothing else in the request depends on the configuration
		}
	}
	return fmt.Errorf("gcp kms: %s: %w: %s", op.name, class, why)
}
