package awss3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/keyagent/keyagent/storage"
)

// explain gives an error of the SDK its class. permission is what a refusal
// means.
func (s *Storage) explain(what string, err error, permission string) error {
	if err == nil {
		return nil
	}
	where := fmt.Sprintf("%s bucket %s", what, s.opts.Bucket)
	switch class := classOf(err); {
	case class == storage.ErrNotFound, class == storage.ErrConflict:
		return class
	case class == errRegion:
		return fmt.Errorf("%s: %w (hint: the bucket is in another region)", where, err)
	case class == storage.ErrDenied && permission != "":
		return fmt.Errorf("%s: %w: %s: %w", where, class, permission, err)
	case class != nil:
		return fmt.Errorf("%s: %w: %w", where, class, err)
	}
	return fmt.Errorf("%s: %w", where, err)
}

// errRegion: another region's service is to be asked.
var errRegion = errors.New("the bucket is in another region")

// classOf is the class of an error of the SDK, or nil.
func classOf(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	var noCredentials credentialsError
	if errors.As(err, &noCredentials) {
		return noCredentials.class()
	}
	var api smithy.APIError
	code := ""
	if errors.As(err, &api) {
		code = api.ErrorCode()
	}
	switch code {
	case "NoSuchKey":
		return storage.ErrNotFound
	case "NoSuchBucket":
		return storage.ErrNoBucket
	case "PreconditionFailed", "ConditionalRequestConflict":
		return storage.ErrConflict
	case "PermanentRedirect", "AuthorizationHeaderMalformed", "MovedPermanently":
		return errRegion
	case "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed", "NotSignedUp":
		return storage.ErrCredentials
	case "SlowDown", "Throttling", "ThrottlingException", "RequestThrottled", "RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequests":
		return storage.ErrThrottled
	case "RequestTimeout":
		return storage.ErrUnavailable
	case "AccessDenied", "AllAccessDisabled":
		return storage.ErrDenied
	}
	var unsent *smithyhttp.RequestSendError
	var network net.Error
	switch status := status(err); {
	case status == http.StatusPreconditionFailed:
		return storage.ErrConflict
	case status == http.StatusUnauthorized:
		return storage.ErrCredentials
	case status == http.StatusForbidden && code == "Forbidden": // of a HEAD, whose answer has no body
		return storage.ErrDenied
	case status == http.StatusTooManyRequests, status == http.StatusServiceUnavailable:
		return storage.ErrThrottled
	case status >= 500:
		return storage.ErrUnavailable
	case errors.As(err, &unsent), errors.As(err, &network), errors.Is(err, context.DeadlineExceeded), errors.Is(err, io.ErrUnexpectedEOF):
		return storage.ErrUnavailable
	}
	return nil
}

// status is the HTTP status of an error, or 0.
func status(err error) int {
	var re *awshttp.ResponseError
	if errors.As(err, &re) {
		return re.HTTPStatusCode()
	}
	return 0
}

// provider marks the errors of the one that it wraps, which the SDK does not.
type provider struct{ aws.CredentialsProvider }

type credentialsError struct{ error }

func (e credentialsError) Unwrap() error { return e.error }

// class tells a service of credentials that does not answer from there being
// none. That an instance has no metadata is the latter: the SDK asks for it last.
func (e credentialsError) class() error {
	var op *smithy.OperationError
	var api smithy.APIError
	if errors.As(e.error, &op) && op.Service() != "ec2imds" && !errors.As(e.error, &api) {
		return storage.ErrUnavailable
	}
	return storage.ErrCredentials
}

func (p provider) Retrieve(ctx context.Context) (aws.Credentials, error) {
	c, err := p.CredentialsProvider.Retrieve(ctx)
	if err != nil {
		return c, credentialsError{err}
	}
	return c, nil
}
