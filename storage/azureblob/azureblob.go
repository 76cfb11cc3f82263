// Package azureblob is a storage in a container of Azure Blob Storage.
//
// Each object of storage is one block blob of the container. A write is a Put
// Blob with If-None-Match or If-Match, which the service decides on atomically,
// so that any number of key services can share one container without talking to
// each other. A version is the ETag that the service gives to what it wrote, and
// the token of the frame (see framed.Frame), by which a write is known again as
// ours when the answer to it was lost.
//
// The service is asked by its REST API over azcore, which does retries, tokens
// and challenges. The few requests that are needed are in this package, which
// adds 1.4 MB to a program that speaks HTTP; the module azblob has all others
// too, and would add 5.0 MB.
//
// The permissions that are needed, as data actions below
// Microsoft.Storage/storageAccounts/blobServices/containers: blobs/read (to read
// and to list), blobs/write, blobs/delete to delete, and the action write on
// containers themselves if the container is to be made. The role Storage Blob
// Data Contributor has all of them.
//
// The container may have versioning, soft deletion and a lifecycle. An account
// with a hierarchical namespace cannot be used, because a name there is either a
// folder or an object.
package azureblob

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"

	"github.com/keyagent/keyagent/internal/endpoint"
	"github.com/keyagent/keyagent/internal/pattern"
	"github.com/keyagent/keyagent/storage"
)

// maxAnswer bounds an answer in bytes: a page of a list is the longest.
const maxAnswer = 16 << 20

// Options say where objects are. Account or Endpoint, Container and Credential
// must be set.
type Options struct {
	Account   string
	Container string
	// Prefix is put before each name, with a slash; default none.
	Prefix string
	// Cloud is the one that the account is in: "public" (the default), "china"
	// or "usgovernment".
	Cloud string
	// Endpoint is the URL of the account, instead of Account and Cloud. It is
	// https, or http on a loopback address.
	Endpoint string
	// Credential says who asks.
	Credential azcore.TokenCredential
	// CreateContainer makes the container if there is none, closed to the
	// public.
	CreateContainer bool
	// EncryptionScope encrypts what is written; default the container's.
	EncryptionScope string
	// Tags are put on each blob that is written.
	Tags storage.Tags
	// RootCAs vouch for the service; nil is the system's.
	RootCAs *x509.CertPool
	// Timeout bounds one call with all its retries; default 30s.
	Timeout time.Duration
	// Attempts bounds how often one call is tried; default 4.
	Attempts int
}

// Storage keeps objects in a container.
type Storage struct {
	pipeline  runtime.Pipeline
	transport *http.Transport
	opts      Options
	container string // its URL
	prefix    string
}

var (
	_ storage.Storage = (*Storage)(nil)
	_ storage.Deleter = (*Storage)(nil)
	_ storage.Purger  = (*Storage)(nil)
)

// scope is what tokens are asked for, in each of the clouds.
const scope = "https://storage.azure.com/.default"

var suffixes = map[string]string{
	"public":       "blob.core.windows.net",
	"china":        "blob.core.chinacloudapi.cn",
	"usgovernment": "blob.core.usgovcloudapi.net",
}

// New checks that the container is there, and makes it if that is asked for.
func New(ctx context.Context, opts Options) (*Storage, error) {
	plain, err := opts.check()
	if err != nil {
		return nil, err
	}
	if opts.Timeout == 0 {
		opts.Timeout = 30 * time.Second
	}
	if opts.Attempts == 0 {
		opts.Attempts = 4
	}
	ctx, cancel := context.WithTimeout(ctx, opts.Timeout)
	defer cancel()
	s := &Storage{opts: opts, transport: http.DefaultTransport.(*http.Transport).Clone()}
	s.transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: opts.RootCAs}
	s.transport.ResponseHeaderTimeout = opts.Timeout
	if opts.Prefix != "" {
		s.prefix = opts.Prefix + "/"
	}
	s.container = strings.TrimSuffix(opts.Endpoint, "/") + "/" + opts.Container
	retries := policy.RetryOptions{MaxRetries: int32(opts.Attempts - 1), RetryDelay: 250 * time.Millisecond, MaxRetryDelay: 5 * time.Second}
	if opts.Attempts == 1 {
		retries.MaxRetries = -1 // 0 is azcore's default
	}
	s.pipeline = runtime.NewPipeline("keyagent", "v1", runtime.PipelineOptions{
		PerRetry: []policy.Policy{
			runtime.NewBearerTokenPolicy(credential{opts.Credential}, []string{scope}, &policy.BearerTokenOptions{InsecureAllowCredentialWithHTTP: plain}),
		},
	}, &policy.ClientOptions{Retry: retries, Transport: &http.Client{Transport: endpoint.Limit(s.transport, maxAnswer)}})
	if err := s.openContainer(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

var (
	accountPattern   = pattern.New(`^[a-z0-9]{3,24}$`)
	containerPattern = pattern.New(`^[a-z0-9](-?[a-z0-9]){2,62}$`)
)

func (o *Options) check() (plain bool, err error) {
	o.Prefix = strings.TrimSuffix(o.Prefix, "/")
	switch {
	case o.Account == "" && o.Endpoint == "":
		return false, errors.New("the account must be named")
	case o.Account != "" && !accountPattern.MatchString(o.Account):
		return false, errors.New("the account is named by 3 to 24 lower-case letters and digits")
	case len(o.Container) > 63 || !containerPattern.MatchString(o.Container):
		return false, errors.New("the container must be named by 3 to 63 lower-case letters, digits and single dashes")
	case o.Prefix != "" && storage.CheckName(o.Prefix) != nil:
		return false, errors.New("the prefix must be made of letters, digits, dots, dashes, underscores and slashes")
	case o.Tags.Check() != nil:
		return false, o.Tags.Check()
	case o.Credential == nil:
		return false, errors.New("a credential is needed")
	case o.Endpoint != "" && o.Cloud != "":
		return false, errors.New("the cloud chooses an endpoint: set one of the two")
	}
	if o.Endpoint != "" {
		return endpoint.Check(o.Endpoint)
	}
	if o.Cloud == "" {
		o.Cloud = "public"
	}
	suffix, ok := suffixes[o.Cloud]
	if !ok {
		return false, errors.New("the cloud is public, china or usgovernment")
	}
	o.Endpoint = "https://" + o.Account + "." + suffix
	return false, nil
}

// openContainer demands that the container is there.
func (s *Storage) openContainer(ctx context.Context) error {
	_, err := s.page(ctx, "", "", "", 1)
	switch {
	case !errors.Is(err, storage.ErrNoBucket):
		return err
	case !s.opts.CreateContainer:
		return fmt.Errorf("%w (hint: create it, or allow it with createContainer=true)", err)
	}
	header := http.Header{}
	if s.opts.EncryptionScope != "" {
		header.Set("X-Ms-Default-Encryption-Scope", s.opts.EncryptionScope)
	}
	_, err = s.send(ctx, http.MethodPut, "", "restype=container", header, nil)
	if codeOf(err) == "ContainerAlreadyExists" {
		return nil // another replica was faster
	}
	return s.explain("create", err, actions+"write")
}

// Close gives idle connections back. Calls that are under way go on.
func (s *Storage) Close() error {
	s.transport.CloseIdleConnections()
	return nil
}
