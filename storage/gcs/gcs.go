// Package gcs is a storage in a bucket of Google Cloud Storage.
//
// Each object of storage is one object of the bucket. A write is an upload with
// ifGenerationMatch, which the service decides on atomically, so that any number
// of key services can share one bucket without talking to each other. A version
// is the generation that the service gives to what it wrote, and the token of
// the frame (see framed.Frame), by which a write is known again as ours when
// the answer to it was lost.
//
// The upload carries a CRC32C, which the service checks before it writes; what is
// read is checked against the service's CRC32C and a digest of our own.
//
// The permissions that are needed: storage.objects.get, storage.objects.list
// (without it, the service does not say whether an object is absent, and it is
// how the bucket is asked for), storage.objects.create, storage.objects.delete
// (to replace an object as well as to delete it), and storage.buckets.create in
// the project if the bucket is to be made. The role Storage Object User has all
// but the last. With KMSKey, it is the service's own account that needs to
// encrypt and decrypt with that key.
//
// The bucket may have versioning, soft deletion and a lifecycle. A retention
// policy must not hold, because records are replaced.
package gcs

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"cloud.google.com/go/auth"
	"cloud.google.com/go/auth/credentials"
	"cloud.google.com/go/auth/httptransport"
	"google.golang.org/api/option"
	api "google.golang.org/api/storage/v1"

	"github.com/keyagent/keyagent/internal/endpoint"
	"github.com/keyagent/keyagent/storage"
)

// maxAnswer bounds an answer in bytes: a page of a list is the longest.
const maxAnswer = 16 << 20

// Options say where objects are. Bucket must be set.
type Options struct {
	Bucket string
	// Prefix is put before each name, with a slash; default none.
	Prefix string
	// CreateBucket makes the bucket in Project if there is none, without access
	// lists and closed to the public.
	CreateBucket bool
	Project      string
	// Location of a bucket that is made; default the service's, which is the
	// United States.
	Location string
	// KMSKey encrypts what is written: projects/P/locations/L/keyRings/R/cryptoKeys/K;
	// default the bucket's.
	KMSKey string
	// Tags are put on each object that is written, as its metadata.
	Tags storage.Tags
	// Endpoint is the URL of another service than Google's. It is https, or
	// http on a loopback address; the latter is not told who asks unless
	// Credentials are set.
	Endpoint string
	// Credentials; nil is the SDK's default chain.
	Credentials *auth.Credentials
	// Timeout bounds one call with all its retries; default 30s.
	Timeout time.Duration
	// Attempts bounds how often one call is tried; default 4.
	Attempts int
}

// Storage keeps objects in a bucket.
type Storage struct {
	service   *api.Service
	transport *http.Transport
	opts      Options
	prefix    string
}

var (
	_ storage.Storage = (*Storage)(nil)
	_ storage.Deleter = (*Storage)(nil)
	_ storage.Purger  = (*Storage)(nil)
)

// scope is the least that allows to write objects and to make a bucket.
const scope = api.DevstorageReadWriteScope

// New checks that the bucket is there, and makes it if that is asked for.
func New(ctx context.Context, opts Options) (*Storage, error) {
	anonymous, err := opts.check()
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
	s.transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	s.transport.ResponseHeaderTimeout = opts.Timeout
	if opts.Prefix != "" {
		s.prefix = opts.Prefix + "/"
	}
	client := &http.Client{Transport: endpoint.Limit(s.transport, maxAnswer)}
	if !anonymous {
		if client, err = s.authenticated(); err != nil {
			return nil, err
		}
	}
	clientOptions := []option.ClientOption{option.WithHTTPClient(client)}
	if opts.Endpoint != "" {
		clientOptions = append(clientOptions, option.WithEndpoint(strings.TrimSuffix(opts.Endpoint, "/")+"/storage/v1/"))
	}
	if s.service, err = api.NewService(ctx, clientOptions...); err != nil {
		return nil, fmt.Errorf("client of Google Cloud Storage: %w", err)
	}
	if err := s.openBucket(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// authenticated is a client that says who asks.
func (s *Storage) authenticated() (*http.Client, error) {
	creds := s.opts.Credentials
	if creds == nil {
		var err error
		if creds, err = credentials.DetectDefault(&credentials.DetectOptions{Scopes: []string{scope}}); err != nil {
			return nil, fmt.Errorf("%w: %w", storage.ErrCredentials, err)
		}
	}
	client, err := httptransport.NewClient(&httptransport.Options{
		DisableTelemetry: true, Credentials: creds, BaseRoundTripper: s.transport,
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", storage.ErrCredentials, err)
	}
	return client, nil
}

func (o *Options) check() (anonymous bool, err error) {
	o.Prefix = strings.TrimSuffix(o.Prefix, "/")
	switch {
	case o.Bucket == "" || strings.ContainsAny(o.Bucket, "/:"):
		return false, errors.New("the bucket must be named, without slashes and colons")
	case o.Prefix != "" && storage.CheckName(o.Prefix) != nil:
		return false, errors.New("the prefix must be made of letters, digits, dots, dashes, underscores and slashes")
	case o.Tags.Check() != nil:
		return false, o.Tags.Check()
	case o.CreateBucket && o.Project == "":
		return false, errors.New("a bucket can only be made in a project that is named")
	case o.KMSKey != "" && (!strings.HasPrefix(o.KMSKey, "projects/") || strings.Contains(o.KMSKey, "/cryptoKeyVersions/")):
		return false, errors.New("the KMS key is of the form projects/P/locations/L/keyRings/R/cryptoKeys/K")
	}
	if o.Endpoint == "" {
		return false, nil
	}
	loopback, err := endpoint.Check(o.Endpoint)
	return loopback && o.Credentials == nil, err
}

// openBucket demands that the bucket is there.
func (s *Storage) openBucket(ctx context.Context) error {
	err := s.askForBucket(ctx)
	if !errors.Is(err, storage.ErrNoBucket) {
		return err
	}
	if !s.opts.CreateBucket {
		return fmt.Errorf("%w (hint: create it, or allow it with createBucket=true)", err)
	}
	bucket := &api.Bucket{
		Name: s.opts.Bucket, Location: s.opts.Location,
		IamConfiguration: &api.BucketIamConfiguration{
			PublicAccessPrevention:   "enforced",
			UniformBucketLevelAccess: &api.BucketIamConfigurationUniformBucketLevelAccess{Enabled: true},
		},
	}
	if s.opts.KMSKey != "" {
		bucket.Encryption = &api.BucketEncryption{DefaultKmsKeyName: s.opts.KMSKey}
	}
	err = s.try(ctx, func() error {
		_, err := s.service.Buckets.Insert(s.opts.Project, bucket).Context(ctx).Do()
		return s.explain("create", err, "storage.buckets.create in the project "+s.opts.Project)
	})
	switch {
	case errors.Is(err, errBucketExists):
		return s.askForBucket(ctx) // another replica was faster, or the name is a stranger's
	case errors.Is(err, storage.ErrNotFound):
		return fmt.Errorf("%w: %s, and it cannot be made: there is no project %s", storage.ErrNoBucket, s.opts.Bucket, s.opts.Project)
	}
	return err
}

// askForBucket returns ErrNoBucket if the bucket is not there. It lists, which
// takes no permission that is not needed anyway; storage.buckets.get would be
// one, and the roles for objects do not have it.
func (s *Storage) askForBucket(ctx context.Context) error {
	_, err := s.page(ctx, "", "", "", 1)
	return err
}

// Close gives idle connections back. Calls that are under way go on.
func (s *Storage) Close() error {
	s.transport.CloseIdleConnections()
	return nil
}
