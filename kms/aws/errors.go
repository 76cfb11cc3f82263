package aws

import (
	"context"
	"errors"
	"fmt"
	"strings"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/smithy-go"

	"github.com/keyagent/keyagent/kms"
)

// permissions that a refusal is about, by what was asked.
var permissions = map[string]string{"describe": "kms:DescribeKey", "encrypt": "kms:Encrypt", "decrypt": "kms:Decrypt"}

// classes of what the service answers, by the code of the error without the word
// Exception, which only some of them have. Others are ErrUnavailable.
var classes = map[string]error{
	"AccessDenied": kms.ErrDenied,

	"InvalidCiphertext": kms.ErrWrongKey,
	"IncorrectKey":      kms.ErrWrongKey,

	"Disabled":        kms.ErrKEK,
	"KMSInvalidState": kms.ErrKEK,
	"NotFound":        kms.ErrKEK,
	"InvalidKeyUsage": kms.ErrKEK,
	"InvalidArn":      kms.ErrKEK,

	"Throttling":           kms.ErrThrottled,
	"LimitExceeded":        kms.ErrThrottled,
	"RequestLimitExceeded": kms.ErrThrottled,
	"TooManyRequests":      kms.ErrThrottled,

	"ExpiredToken":               kms.ErrCredentials,
	"UnrecognizedClient":         kms.ErrCredentials,
	"InvalidClientTokenId":       kms.ErrCredentials,
	"InvalidSignature":           kms.ErrCredentials,
	"SignatureDoesNotMatch":      kms.ErrCredentials,
	"IncompleteSignature":        kms.ErrCredentials,
	"MissingAuthenticationToken": kms.ErrCredentials,
	"NotAuthorized":              kms.ErrCredentials,
	"RequestExpired":             kms.ErrCredentials,
}

// explain gives an error of the SDK its class. ctx is the caller's, without our
// own timeout.
func (k *KMS) explain(ctx context.Context, what string, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("aws kms: %s: %w", what, context.Canceled)
	}
	if errors.Is(err, kms.ErrCredentials) {
		return fmt.Errorf("aws kms: %s: %w", what, err)
	}
	// This one carries all of the answer, which may hold a key.
	if unread := (*smithy.DeserializationError)(nil); errors.As(err, &unread) {
		return fmt.Errorf("aws kms: %s: %w: its answer cannot be read", what, kms.ErrUnavailable)
	}
	var api smithy.APIError
	if !errors.As(err, &api) {
		return fmt.Errorf("aws kms: %s: %w: %w", what, kms.ErrUnavailable, err)
	}
	// The service's own words, and not the SDK's whole chain, bounded.
	why := api.ErrorMessage()
	why = api.ErrorCode() + ": " + why[:min(len(why), 256)]
	switch class := classes[strings.TrimSuffix(api.ErrorCode(), "Exception")]; class {
	case nil:
		return fmt.Errorf("aws kms: %s: %w: %s", what, kms.ErrUnavailable, why)
	case kms.ErrDenied:
		return fmt.Errorf("aws kms: %s: %w: %s on the key %s: %s", what, class, permissions[what], k.opts.Key, why)
	case kms.ErrCredentials:
		// The service may repeat the identity it was shown.
		return fmt.Errorf("aws kms: %s: %w: %s", what, class, api.ErrorCode())
	default:
		return fmt.Errorf("aws kms: %s: %w: %s", what, class, why)
	}
}

// credentials gives the errors of a provider their class: the SDK has no type
// for them.
type credentials struct{ awssdk.CredentialsProvider }

func (c credentials) Retrieve(ctx context.Context) (awssdk.Credentials, error) {
	got, err := c.CredentialsProvider.Retrieve(ctx)
	if err != nil {
		err = fmt.Errorf("%w: %w", kms.ErrCredentials, err)
	}
	return got, err
}
