package azure

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"

	"github.com/keyagent/keyagent/kms"
)

// operation is one of the calls, with its permission in a vault and in a managed
// HSM.
type operation struct{ name, vault, hsm string }

var (
	get    = operation{"get", "keys/get", "Microsoft.KeyVault/managedHsm/keys/read/action"}
	wrap   = operation{"wrap", "keys/wrapKey", "Microsoft.KeyVault/managedHsm/keys/wrap/action"}
	unwrap = operation{"unwrap", "keys/unwrapKey", "Microsoft.KeyVault/managedHsm/keys/unwrap/action"}
)

func (k *KMS) permission(op operation) string {
	if k.hsm {
		return op.hsm
	}
	return op.vault
}

// failure is the error document of a vault. What it means is often only in the
// code inside.
type failure struct {
	Error struct {
		Code, Message string
		InnerError    struct{ Code string }
	}
}

// unusable are the codes inside a refusal that are about the key and not about
// who asks.
var unusable = map[string]bool{"KeyDisabled": true, "KeyExpired": true, "KeyNotYetValid": true}

// explain gives an error of the SDK its class. ctx is the caller's, without our
// own timeout.
func (k *KMS) explain(ctx context.Context, op operation, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("azure kms: %s: %w", op.name, context.Canceled)
	}
	if errors.Is(err, kms.ErrCredentials) {
		return fmt.Errorf("azure kms: %s: %w", op.name, err)
	}
	var re *azcore.ResponseError
	if !errors.As(err, &re) {
		return fmt.Errorf("azure kms: %s: %w: %w", op.name, kms.ErrUnavailable, err)
	}
	// The SDK's own text repeats all of the answer.
	var f failure
	if body, err := runtime.Payload(re.RawResponse); err == nil {
		_ = json.Unmarshal(body, &f) // what is no error document says nothing
	}
	inner := f.Error.InnerError.Code
	why := fmt.Sprintf("%d %s %s", re.StatusCode, short(re.ErrorCode), short(inner))
	if re.StatusCode != http.StatusUnauthorized { // which may repeat whose token it was
		why += ": " + short(f.Error.Message)
	}
	why = strings.Join(strings.Fields(why), " ")
	class := kms.ErrUnavailable
	switch re.StatusCode {
	case http.StatusUnauthorized:
		class = kms.ErrCredentials
	case http.StatusForbidden:
		if unusable[inner] || unusable[re.ErrorCode] {
			class = kms.ErrKEK
			break
		}
		return fmt.Errorf("azure kms: %s: %w: %s on the key %s of %s: %s", op.name, kms.ErrDenied, k.permission(op), k.opts.Key, k.host, why)
	case http.StatusNotFound:
		class = kms.ErrKEK
	case http.StatusTooManyRequests:
		class = kms.ErrThrottled
	case http.StatusBadRequest:
		switch {
		case re.ErrorCode != "BadParameter":
		case op == unwrap:
			class = kms.ErrWrongKey
		default:
			class = kms.ErrKEK // nothing else in the request depends on the configuration
		}
	}
	return fmt.Errorf("azure kms: %s: %w: %s", op.name, class, why)
}

// short bounds words of others.
func short(text string) string { return text[:min(len(text), 256)] }

// credential gives the errors of a credential their class: those of azidentity
// have several types, and others may have any.
type credential struct{ azcore.TokenCredential }

// refused is an error of a credential. Its text is cut, because those of azidentity
// repeat all of an answer.
type refused struct{ error }

func (r refused) Error() string { return strings.Join(strings.Fields(short(r.error.Error())), " ") }
func (r refused) Unwrap() error { return r.error }

func (c credential) GetToken(ctx context.Context, options policy.TokenRequestOptions) (azcore.AccessToken, error) {
	token, err := c.TokenCredential.GetToken(ctx, options)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w: %w", kms.ErrCredentials, refused{err})
	}
	return token, err
}

// challenges drops challenges that the SDK would panic on: it takes the fourth part
// of the authorization's URL without counting. Where the vault is reached by another
// name, the SDK does not look at what a token is to be for: an endpoint that lies
// could ask for one that manages the whole account. It is for the vault's own domain,
// or for one that the endpoint is in.
type challenges struct {
	next     http.RoundTripper
	domain   string // of the vault
	endpoint string // or ""
}

func (c challenges) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := c.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	for field := range strings.FieldsSeq(strings.ReplaceAll(resp.Header.Get("WWW-Authenticate"), ",", " ")) {
		key, value, _ := strings.Cut(field, "=")
		value = strings.Trim(value, `"`)
		switch {
		case key == "authorization" && strings.Count(value, "/") < 3,
			(key == "resource" || key == "scope") && c.endpoint != "" && !c.trusts(value):
			resp.Header.Del("WWW-Authenticate")
			return resp, nil
		}
	}
	return resp, nil
}

// trusts reports whether tokens for a resource may be shown to the endpoint.
func (c challenges) trusts(resource string) bool {
	u, err := url.Parse(strings.TrimSuffix(resource, "/.default"))
	if err != nil || u.Scheme != "https" || u.Hostname() == "" {
		return false
	}
	here, err := url.Parse(c.endpoint)
	if err != nil {
		return false
	}
	return u.Hostname() == c.domain || strings.HasSuffix(here.Hostname(), "."+u.Hostname())
}
