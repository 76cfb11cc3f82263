// Package gcp is a KMS over Google's Cloud Key Management Service: DEKs are
// random, and encrypted by a symmetric key that never leaves the service.
//
// The binding is the additional authenticated data of each call. Checksums go
// along in both directions and are checked in both, as Google asks its clients to
// do: a DEK that was damaged on the way would make a disk that never opens again.
//
// Anyone who can write the storage must not choose the key. A wrapped key therefore
// opens only under the key of [Options] or one of Options.OldKeys. Its version is
// found by the service; Wrapped.KEK says which one it was when the key was
// wrapped, and the blob says so too, so that an old blob is not taken for one of
// the current version by mistake. Neither of them is authenticated here: what
// somebody writes into both is caught by the MAC of the key service's records.
//
// The permissions that are needed are cloudkms.cryptoKeyVersions.useToEncrypt and
// cloudkms.cryptoKeys.get on the key, and
// cloudkms.cryptoKeyVersions.useToDecrypt on it and on each of OldKeys. After a
// rotation the service may encrypt under the former version for a while
// (Google speaks of minutes, at most hours), although Current names the new one.
//
// The SDK copies what it sends and receives. The copies that this package
// cannot reach to wipe stay until the garbage collector reuses them.
//
// The format is specified in docs/spec/keys.md.
package gcp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"cloud.google.com/go/auth"
	authcredentials "cloud.google.com/go/auth/credentials"
	service "cloud.google.com/go/kms/apiv1"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/keyagent/keyagent/internal/endpoint"
	"github.com/keyagent/keyagent/internal/pattern"
	"github.com/keyagent/keyagent/kms"
)

// Options configure [New]. The first four must be set.
type Options struct {
	// Project, Location, KeyRing and Key name the key that wraps. Project is
	// the ID, as the service itself writes it into names.
	Project, Location, KeyRing, Key string
	// OldKeys are further keys under which wrapped keys may be opened, each in
	// the form projects/P/locations/L/keyRings/R/cryptoKeys/K. Default none.
	OldKeys []string
	// Endpoint of the service; default Google's. It is https://HOST:PORT, or
	// http on a loopback address, which is then spoken to in plain text and
	// without credentials.
	Endpoint string
	// Credentials; nil is the SDK's default chain.
	Credentials *auth.Credentials
	// Timeout bounds one call with all its retries; default 30s.
	Timeout time.Duration
	// Attempts bounds how often one call is tried; default 4.
	Attempts int
}

// KMS wraps keys by a key of the service.
type KMS struct {
	opts   Options
	name   string   // of the key
	keys   []string // it, and the old ones
	client *service.KeyManagementClient
	closed atomic.Bool
}

var (
	_ kms.KMS   = (*KMS)(nil)
	_ kms.Namer = (*KMS)(nil)
)

var errClosed = fmt.Errorf("gcp kms: %w", kms.ErrClosed)

const cloudScope = "https://www.googleapis.com/auth/cloudkms"

var (
	keyPattern     = pattern.New(`^projects/[a-z0-9][a-z0-9.:-]{0,98}[a-z0-9]/locations/[a-z0-9-]{1,63}/keyRings/[A-Za-z0-9_-]{1,63}/cryptoKeys/[A-Za-z0-9_-]{1,63}$`)
	versionPattern = pattern.New(`^(.{1,500})/cryptoKeyVersions/([1-9][0-9]{0,17})$`)
)

// New returns a KMS. It asks the service nothing yet.
func New(ctx context.Context, opts Options) (*KMS, error) {
	name := "projects/" + opts.Project + "/locations/" + opts.Location + "/keyRings/" + opts.KeyRing + "/cryptoKeys/" + opts.Key
	address, plain, err := opts.check(name)
	if err != nil {
		return nil, err
	}
	if opts.Timeout == 0 {
		opts.Timeout = 30 * time.Second
	}
	if opts.Attempts == 0 {
		opts.Attempts = 4
	}
	settings := []option.ClientOption{
		// The SDK can be told by the environment to log what it sends, keys
		// included.
		option.WithLogger(slog.New(slog.DiscardHandler)),
		option.WithTelemetryDisabled(),
		option.WithUserAgent("keyagent"),
	}
	if address != "" {
		settings = append(settings, option.WithEndpoint(address))
	}
	switch {
	case plain:
		settings = append(settings, option.WithoutAuthentication(), option.WithGRPCDialOption(grpc.WithTransportCredentials(insecure.NewCredentials())))
	case opts.Credentials == nil:
		opts.Credentials, err = authcredentials.DetectDefault(&authcredentials.DetectOptions{Scopes: []string{cloudScope}, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			return nil, fmt.Errorf("gcp kms: %w: %w", kms.ErrCredentials, err)
		}
		fallthrough
	default:
		settings = append(settings, option.WithAuthCredentials(opts.Credentials))
	}
	// The context is that of connections, which outlive this call.
	client, err := service.NewKeyManagementClient(context.WithoutCancel(ctx), settings...)
	if err != nil {
		return nil, fmt.Errorf("gcp kms: %w", err)
	}
	k := &KMS{opts: opts, name: name, keys: append([]string{name}, opts.OldKeys...), client: client}
	client.CallOptions.Encrypt = k.callOptions()
	client.CallOptions.Decrypt = k.callOptions()
	client.CallOptions.GetCryptoKey = k.callOptions()
	return k, nil
}

// check also returns where to connect to if that is not Google's own place, and
// whether it is in plain text.
func (o *Options) check(name string) (address string, plain bool, err error) {
	switch {
	case o.Project == "" || o.Location == "" || o.KeyRing == "" || o.Key == "":
		return "", false, errors.New("project, location, key ring and key must be set")
	case !keyPattern.MatchString(name):
		return "", false, errors.New("project, location, key ring and key must be names, without slashes")
	case len(o.OldKeys) > 100:
		return "", false, errors.New("there are more than 100 old keys")
	case slices.ContainsFunc(o.OldKeys, func(old string) bool { return !keyPattern.MatchString(old) }):
		return "", false, errors.New("each old key must be of the form projects/P/locations/L/keyRings/R/cryptoKeys/K")
	case o.Timeout < 0 || o.Attempts < 0:
		return "", false, errors.New("timeout and attempts cannot be negative")
	case o.Endpoint == "":
		return "", false, nil
	}
	if plain, err = endpoint.Check(o.Endpoint); err != nil {
		return "", false, err
	}
	u, err := url.Parse(o.Endpoint)
	switch {
	case err != nil || u.Port() == "" || strings.Trim(u.Path, "/") != "":
		return "", false, errors.New("the endpoint must be of the form https://HOST:PORT")
	case plain && o.Credentials != nil:
		return "", false, errors.New("credentials would go over an endpoint without TLS")
	}
	return u.Host, plain, nil
}

// Close ends the connections. Calls fail afterwards.
func (k *KMS) Close() error {
	if k.closed.Swap(true) {
		return nil
	}
	return k.client.Close()
}
