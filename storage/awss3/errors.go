package awss3

import (
	"errors"
	"fmt"
	"net/http"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"

	"github.com/keyagent/keyagent/storage"
)

// explain gives an error of the SDK its class. permission is what a refusal
// means.
func (s *Storage) explain(what string, err error, permission string) error {
	if err == nil {
		return nil
	}
	var api smithy.APIError
	code := ""
	if errors.As(err, &api) {
		code = api.ErrorCode()
	}
	switch {
	case code == "NoSuchKey":
		return storage.ErrNotFound
	case code == "NoSuchBucket":
		return fmt.Errorf("%s bucket %s: %w: %w", what, s.opts.Bucket, storage.ErrNoBucket, err)
	case code == "PreconditionFailed", status(err) == http.StatusPreconditionFailed, code == "ConditionalRequestConflict":
		return storage.ErrConflict
	case code == "PermanentRedirect", code == "AuthorizationHeaderMalformed", code == "MovedPermanently":
		return fmt.Errorf("%s bucket %s: %w (hint: the bucket is in another region)", what, s.opts.Bucket, err)
	case permission != "" && (code == "AccessDenied" || code == "AllAccessDisabled" || status(err) == http.StatusForbidden && code == "Forbidden"):
		return fmt.Errorf("%s bucket %s: %w: %s: %w", what, s.opts.Bucket, storage.ErrDenied, permission, err)
	}
	return fmt.Errorf("%s bucket %s: %w", what, s.opts.Bucket, err)
}

// status is the HTTP status of an error, or 0.
func status(err error) int {
	var re *awshttp.ResponseError
	if errors.As(err, &re) {
		return re.HTTPStatusCode()
	}
	return 0
}
