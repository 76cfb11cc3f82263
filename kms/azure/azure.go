// Package azure is a KMS over Azure Key Vault and Azure Managed HSM: each DEK is
// random, and sealed under a content key that only the vault can unwrap.
//
// The vault wraps without associated data. The DEK is therefore sealed here, by
// backend.Seal with the binding as associated data, under a fresh content key
// of 32 bytes, and it is the content key that the vault wraps: by RSA-OAEP-256
// under an RSA key, by A256KW under a symmetric key of a managed HSM.
//
// Under an RSA key, anybody can wrap: its public half is no secret, and anyone who
// can write the storage can plant a DEK of their own choice. Nothing in this
// package can notice that. It is why the key service authenticates its records by
// a MAC.
//
// Anyone who can write the storage must not choose the key either. A wrapped key
// opens only by the configured key of the configured vault, by the version that
// Wrapped.KEK names.
//
// The permissions that are needed: keys/get, keys/wrapKey and keys/unwrapKey; of a
// managed HSM Microsoft.KeyVault/managedHsm/keys/read/action, …/wrap/action and
// …/unwrap/action.
//
// The SDK copies the content key that it sends and receives. The copies that this
// package cannot reach to wipe stay until the garbage collector reuses them. The
// DEK itself never leaves this process.
//
// The format is specified in docs/spec/keys.md.
package azure

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"

	"github.com/keyagent/keyagent/internal/endpoint"
	"github.com/keyagent/keyagent/internal/pattern"
	"github.com/keyagent/keyagent/kms"
)

// Options configure [New]. VaultName, Key and Credential must be set.
type Options struct {
	// VaultName is the first part of the vault's host name.
	VaultName string
	// VaultType is keyvault, which is the default, or managedhsm. The domain of
	// either in one of the clouds is accepted too, and says which cloud it is:
	// vault.azure.net, vault.azure.cn, vault.usgovcloudapi.net,
	// managedhsm.azure.net, managedhsm.azure.cn, managedhsm.usgovcloudapi.net.
	VaultType string
	// Cloud is public, which is the default, china or usgovernment.
	Cloud string
	// Key is the name of the key that wraps.
	Key string
	// Credential gets tokens for the vault.
	Credential azcore.TokenCredential
	// Endpoint is where the vault is reached, if that is not its host name. It
	// is https. The vault's challenge may then name any resource.
	Endpoint string
	// RootCAs vouch for the vault; nil is the system's.
	RootCAs *x509.CertPool
	// Timeout bounds one call with all its retries; default 30s.
	Timeout time.Duration
	// Attempts bounds how often one call is tried; default 4.
	Attempts int
}

// KMS wraps keys by a key of a vault.
type KMS struct {
	opts      Options
	host      string // of the vault, as it is in the IDs of its keys
	hsm       bool
	client    *azkeys.Client
	transport *http.Transport
	algorithm atomic.Pointer[string] // of the latest version that was seen
	closed    atomic.Bool
}

var (
	_ kms.KMS   = (*KMS)(nil)
	_ kms.Namer = (*KMS)(nil)
)

// maxAnswer bounds an answer in bytes.
const maxAnswer = 256 << 10

var errClosed = fmt.Errorf("azure kms: %w", kms.ErrClosed)

// domains of the clouds, by the type of a vault.
var domains = map[string]map[string]string{
	"keyvault":   {"public": "vault.azure.net", "china": "vault.azure.cn", "usgovernment": "vault.usgovcloudapi.net"},
	"managedhsm": {"public": "managedhsm.azure.net", "china": "managedhsm.azure.cn", "usgovernment": "managedhsm.usgovcloudapi.net"},
}

var (
	vaultPattern   = pattern.New(`^[a-z][a-z0-9-]{1,22}[a-z0-9]$`)
	keyPattern     = pattern.New(`^[0-9A-Za-z-]{1,127}$`)
	versionPattern = pattern.New(`^[0-9a-f]{32}$`)
)

// New asks the vault for the key, and demands that it can wrap and unwrap.
func New(ctx context.Context, opts Options) (*KMS, error) {
	domain, err := opts.check()
	if err != nil {
		return nil, err
	}
	if opts.Timeout == 0 {
		opts.Timeout = 30 * time.Second
	}
	if opts.Attempts == 0 {
		opts.Attempts = 4
	}
	k := &KMS{
		opts: opts, host: opts.VaultName + "." + domain, hsm: strings.HasPrefix(domain, "managedhsm."),
		transport: &http.Transport{
			Proxy:           http.ProxyFromEnvironment,
			TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: opts.RootCAs},
			// A custom TLS configuration turns it off.
			ForceAttemptHTTP2: true, MaxResponseHeaderBytes: 64 << 10,
			TLSHandshakeTimeout: 10 * time.Second, IdleConnTimeout: 90 * time.Second,
		},
	}
	settings := &azkeys.ClientOptions{
		DisableChallengeResourceVerification: opts.Endpoint != "",
		ClientOptions: policy.ClientOptions{
			Transport: &http.Client{
				Transport: challenges{endpoint.Limit(k.transport, maxAnswer), domain, opts.Endpoint},
				// A redirect could send a content key elsewhere.
				CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			},
			Retry:     policy.RetryOptions{MaxRetries: int32(opts.Attempts - 1), RetryDelay: 200 * time.Millisecond, MaxRetryDelay: 5 * time.Second},
			Telemetry: policy.TelemetryOptions{ApplicationID: "keyagent"},
		},
	}
	if opts.Attempts == 1 {
		settings.Retry.MaxRetries = -1 // which is how the SDK spells none
	}
	address := opts.Endpoint
	if address == "" {
		address = "https://" + k.host
	}
	if k.client, err = azkeys.NewClient(address, credential{opts.Credential}, settings); err != nil {
		return nil, fmt.Errorf("azure kms: %w", err)
	}
	if _, err := k.Current(ctx); err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

// check also returns the domain of the vault.
func (o *Options) check() (domain string, err error) {
	o.VaultName = strings.ToLower(o.VaultName)
	switch {
	case !vaultPattern.MatchString(o.VaultName) || strings.Contains(o.VaultName, "--"):
		return "", errors.New("the vault must be named: 3 to 24 letters, digits and single dashes, without its domain")
	case !keyPattern.MatchString(o.Key):
		return "", errors.New("the key must be named: letters, digits and dashes, without its version")
	case o.Credential == nil:
		return "", errors.New("the credential must be set")
	case o.Timeout < 0 || o.Attempts < 0 || o.Attempts > 100:
		return "", errors.New("timeout and attempts cannot be negative, and there are at most 100 attempts")
	}
	if domain, err = o.domain(); err != nil || o.Endpoint == "" {
		return domain, err
	}
	plain, err := endpoint.Check(o.Endpoint)
	if err != nil {
		return "", err
	}
	u, err := url.Parse(o.Endpoint)
	if err != nil || plain || strings.Trim(u.Path, "/") != "" {
		return "", errors.New("the endpoint must be of the form https://HOST:PORT")
	}
	o.Endpoint = "https://" + u.Host
	return domain, nil
}

func (o *Options) domain() (string, error) {
	for _, clouds := range domains {
		for cloud, domain := range clouds {
			if o.VaultType != domain {
				continue
			}
			if o.Cloud != "" && o.Cloud != cloud {
				return "", fmt.Errorf("the domain %s is of the cloud %s, the option says %s", domain, cloud, o.Cloud)
			}
			return domain, nil
		}
	}
	kind, cloud := o.VaultType, o.Cloud
	if kind == "" {
		kind = "keyvault"
	}
	if cloud == "" {
		cloud = "public"
	}
	switch {
	case strings.HasSuffix(kind, ".microsoftazure.de"):
		return "", errors.New("the German cloud was closed in 2021: its vaults are gone")
	case domains[kind] == nil:
		return "", errors.New("the type of the vault is keyvault, managedhsm, or the domain of one of them: vault.azure.net, vault.azure.cn, " +
			"vault.usgovcloudapi.net, managedhsm.azure.net, managedhsm.azure.cn or managedhsm.usgovcloudapi.net")
	case domains[kind][cloud] == "":
		return "", errors.New("the cloud is public, china or usgovernment")
	}
	return domains[kind][cloud], nil
}

// Close ends idle connections. Calls fail afterwards.
func (k *KMS) Close() error {
	k.closed.Store(true)
	k.transport.CloseIdleConnections()
	return nil
}
