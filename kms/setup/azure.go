//go:build !keyagent_noazure

package setup

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/url"
	"sync"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/keyagent/keyagent/kms"
	azurekms "github.com/keyagent/keyagent/kms/azure"
	"github.com/keyagent/keyagent/storage/azureblob"
)

func azureKMS(ctx context.Context, u *kms.URI) (Keys, error) {
	opts := azurekms.Options{Cloud: u.Optional("cloud"), Endpoint: u.Optional("endpoint")}
	if err := required(u, map[string]*string{"vaultName": &opts.VaultName, "vaultType": &opts.VaultType, "keyName": &opts.Key}); err != nil {
		return nil, err
	}
	var err error
	if opts.RootCAs, err = roots(u.Optional("caFile")); err != nil {
		return nil, err
	}
	if opts.Credential, err = azureCredential(u, opts.RootCAs); err != nil {
		return nil, err
	}
	if err := u.Done(); err != nil {
		return nil, err
	}
	return opened[Keys](azurekms.New(ctx, opts))
}

func azureStorage(ctx context.Context, u *kms.URI) (Objects, error) {
	opts := azureblob.Options{
		Prefix: u.Optional("prefix"), Cloud: u.Optional("cloud"), Endpoint: u.Optional("endpoint"), EncryptionScope: u.Optional("encryptionScope"),
	}
	if err := required(u, map[string]*string{"account": &opts.Account, "container": &opts.Container}); err != nil {
		return nil, err
	}
	var err error
	if opts.CreateContainer, err = flag(u, "createContainer"); err != nil {
		return nil, err
	}
	if opts.Tags, err = tags(u); err != nil {
		return nil, err
	}
	if opts.RootCAs, err = roots(u.Optional("caFile")); err != nil {
		return nil, err
	}
	if opts.Credential, err = azureCredential(u, opts.RootCAs); err != nil {
		return nil, err
	}
	if err := u.Done(); err != nil {
		return nil, err
	}
	return opened[Objects](azureblob.New(ctx, opts))
}

// azureClouds are where each cloud's tokens come from.
var azureClouds = map[string]cloud.Configuration{
	"": cloud.AzurePublic, "public": cloud.AzurePublic, "china": cloud.AzureChina, "usgovernment": cloud.AzureGovernment,
}

// azureCredential is a service principal if the URI has tenantID, clientID and
// clientSecret; a managed identity of the user's if it has clientID alone; else
// the SDK's default chain.
func azureCredential(u *kms.URI, roots *x509.CertPool) (azcore.TokenCredential, error) {
	tenant, client, authority := u.Optional("tenantID"), u.Optional("clientID"), u.Optional("authorityHost")
	secret, err := credential(u, "clientSecret")
	if err != nil {
		return nil, err
	}
	name := u.Optional("cloud")
	where, ok := azureClouds[name]
	if !ok {
		return nil, fmt.Errorf("%w: the parameter \"cloud\" is public, china or usgovernment", kms.ErrURI)
	}
	if authority != "" {
		if a, err := url.Parse(authority); err != nil || a.Scheme != "https" || a.Host == "" || a.User != nil || a.RawQuery != "" {
			return nil, fmt.Errorf("%w: the parameter \"authorityHost\" is of the form https://HOST/", kms.ErrURI)
		}
		where.ActiveDirectoryAuthorityHost = authority
	}
	opts := policy.ClientOptions{Cloud: where, Retry: policy.RetryOptions{MaxRetries: 3}}
	if roots != nil {
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}
		opts.Transport = &http.Client{Transport: t}
	}
	switch {
	case secret != nil && tenant != "" && client != "":
		p := &principal{tenant: tenant, client: client, secret: secret, opts: azidentity.ClientSecretCredentialOptions{
			ClientOptions: opts, DisableInstanceDiscovery: authority != "",
		}}
		_, err := p.current() // a file that is not there is noticed now
		return p, err
	case secret != nil || tenant != "":
		return nil, fmt.Errorf("%w: %s://%s needs the parameters tenantID, clientID and clientSecret together (the last also as …File or …Credential), or clientID alone for a managed identity", kms.ErrURI, u.Scheme, u.Name)
	case client != "":
		c, err := azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{ClientOptions: opts, ID: azidentity.ClientID(client)})
		return opened[azcore.TokenCredential](c, err)
	}
	c, err := azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{ClientOptions: opts, DisableInstanceDiscovery: authority != ""})
	return opened[azcore.TokenCredential](c, err)
}

// principal is a service principal whose secret may be renewed in its file.
type principal struct {
	tenant, client string
	secret         func() (string, error)
	opts           azidentity.ClientSecretCredentialOptions

	mu    sync.Mutex
	with  string
	inner *azidentity.ClientSecretCredential
}

// GetToken implements azcore.TokenCredential. The SDK keeps tokens: it is called
// when one ends.
func (p *principal) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	c, err := p.current()
	if err != nil {
		return azcore.AccessToken{}, err
	}
	return c.GetToken(ctx, o)
}

func (p *principal) current() (*azidentity.ClientSecretCredential, error) {
	s, err := p.secret()
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.inner == nil || p.with != s {
		if p.inner, err = azidentity.NewClientSecretCredential(p.tenant, p.client, s, &p.opts); err != nil {
			return nil, err
		}
		p.with = s
	}
	return p.inner, nil
}
