package azureblob

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"

	"github.com/keyagent/keyagent/storage"
)

// actions is what Azure's names of permissions begin with.
const actions = "Microsoft.Storage/storageAccounts/blobServices/containers/"

// answer is a refusal by the service.
type answer struct {
	status        int
	code, request string
}

func (a *answer) Error() string {
	return fmt.Sprintf("%d %s (request %q)", a.status, a.code, a.request)
}

func answerOf(resp *http.Response) error {
	a := &answer{status: resp.StatusCode, request: resp.Header.Get("X-Ms-Request-Id")}
	var e *azcore.ResponseError
	if errors.As(runtime.NewResponseError(resp), &e) {
		a.code = e.ErrorCode
	}
	return a
}

// codeOf is the service's code of an error, or "".
func codeOf(err error) string {
	var a *answer
	if errors.As(err, &a) {
		return a.code
	}
	return ""
}

// credential marks the errors of the one that it wraps.
type credential struct{ azcore.TokenCredential }

type credentialError struct{ error }

func (e credentialError) Unwrap() error { return e.error }

func (c credential) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	token, err := c.TokenCredential.GetToken(ctx, o)
	if err != nil {
		return token, credentialError{err}
	}
	return token, nil
}

// explain gives an error its class. permission is what a refusal means.
func (s *Storage) explain(what string, err error, permission string) error {
	if err == nil {
		return nil
	}
	where := fmt.Sprintf("%s container %s", what, s.opts.Container)
	class := classOf(err)
	switch {
	case class == storage.ErrNotFound, class == storage.ErrConflict:
		return class
	case class == storage.ErrDenied && permission != "":
		return fmt.Errorf("%s: %w: %s: %w", where, class, permission, err)
	case class != nil:
		return fmt.Errorf("%s: %w: %w", where, class, err)
	}
	return fmt.Errorf("%s: %w", where, err)
}

// classOf is the class of an error, or nil.
func classOf(err error) error {
	var noToken credentialError
	var network net.Error
	var a *answer
	switch {
	case errors.Is(err, context.Canceled):
		return nil
	case errors.As(err, &network), errors.Is(err, context.DeadlineExceeded):
		return storage.ErrUnavailable // also where tokens come from
	case errors.As(err, &noToken):
		return storage.ErrCredentials
	case !errors.As(err, &a):
		return storage.ErrUnavailable // a connection that broke
	}
	switch a.code {
	case "BlobNotFound":
		return storage.ErrNotFound
	case "ContainerNotFound", "ContainerBeingDeleted", "ContainerDisabled":
		return storage.ErrNoBucket
	case "ConditionNotMet", "BlobAlreadyExists":
		return storage.ErrConflict
	case "AuthenticationFailed", "InvalidAuthenticationInfo", "NoAuthenticationInformation":
		return storage.ErrCredentials
	case "ServerBusy":
		return storage.ErrThrottled
	}
	switch {
	case a.status == http.StatusUnauthorized:
		return storage.ErrCredentials
	case a.status == http.StatusForbidden:
		return storage.ErrDenied
	case a.status == http.StatusTooManyRequests, a.status == http.StatusServiceUnavailable:
		return storage.ErrThrottled
	case a.status >= 500, a.status == http.StatusRequestTimeout:
		return storage.ErrUnavailable
	}
	return nil
}
