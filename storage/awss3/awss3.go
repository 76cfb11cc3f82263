// Package awss3 is a storage in a bucket of Amazon S3, or of a service that
// speaks its protocol and checks conditions.
//
// Each object of storage is one object of the bucket. A write is a PUT with
// If-None-Match or If-Match, which S3 decides on atomically, so that any number
// of key services can share one bucket without talking to each other.
//
// An ETag alone is no version: the same content has the same ETag again. Each
// object therefore begins with a line that has a random token in it, see
// framed.Frame, and a version is the token and the ETag.
//
// Directory buckets (S3 Express) are refused, because they do not list in
// order. A bucket may have versioning, default encryption and a lifecycle; it
// must not be replicated in both directions, because conditions hold within one
// bucket only.
//
// The permissions that are needed: s3:GetObject, s3:PutObject, s3:ListBucket
// (without it, S3 does not say whether an object is absent), s3:DeleteObject to
// delete, s3:ListBucketVersions and s3:DeleteObjectVersion
// to destroy earlier versions, s3:PutObjectTagging for tags, and s3:CreateBucket if the bucket is to be made.
package awss3

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/logging"

	"github.com/keyagent/keyagent/internal/endpoint"
	"github.com/keyagent/keyagent/storage"
)

// maxAnswer bounds an answer in bytes: a page of a list is the longest.
const maxAnswer = 16 << 20

// client bounds the answers of the SDK's own.
type client struct{ aws.HTTPClient }

func (c client) Do(r *http.Request) (*http.Response, error) {
	resp, err := c.HTTPClient.Do(r)
	if err != nil {
		return nil, err
	}
	return endpoint.Bound(resp, maxAnswer)
}

// Options say where objects are. Bucket must be set.
type Options struct {
	Bucket string
	// Prefix is put before each name, with a slash; default none.
	Prefix string
	// Region of the bucket; default what the SDK finds in its environment.
	Region string
	// Endpoint is the URL of another service than Amazon's. It is https, or
	// http on a loopback address; the bucket is then named in the path.
	Endpoint string
	// Credentials; nil is the SDK's default chain.
	Credentials aws.CredentialsProvider
	// BucketOwner is the account that the bucket must belong to; default any.
	BucketOwner string
	// CreateBucket makes the bucket if there is none.
	CreateBucket bool
	// Encryption at rest: "AES256", "aws:kms", or "" for the bucket's default.
	Encryption string
	// KMSKey is the key of aws:kms; default the account's.
	KMSKey string
	// Tags are put on each object that is written.
	Tags storage.Tags
	// Timeout bounds one call with all its retries; default 30s.
	Timeout time.Duration
	// Attempts bounds how often one call is tried; default 4. The SDK's
	// budget of retries bounds them over all calls.
	Attempts int
}

// Storage keeps objects in a bucket.
type Storage struct {
	client *s3.Client
	opts   Options
	prefix string
}

var (
	_ storage.Storage = (*Storage)(nil)
	_ storage.Deleter = (*Storage)(nil)
	_ storage.Purger  = (*Storage)(nil)
)

// New checks that the bucket is there, and makes it if that is asked for.
func New(ctx context.Context, opts Options) (*Storage, error) {
	if err := opts.check(); err != nil {
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
	load := []func(*config.LoadOptions) error{
		config.WithHTTPClient(awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
			t.TLSClientConfig.MinVersion = tls.VersionTLS12
			t.ResponseHeaderTimeout = opts.Timeout
		})),
		config.WithLogger(logging.Nop{}), // errors are returned
		config.WithRetryer(func() aws.Retryer {
			return retry.NewStandard(func(o *retry.StandardOptions) {
				o.MaxAttempts = opts.Attempts
				o.MaxBackoff = 5 * time.Second
			})
		}),
	}
	if opts.Region != "" {
		load = append(load, config.WithRegion(opts.Region))
	}
	if opts.Credentials != nil {
		load = append(load, config.WithCredentialsProvider(opts.Credentials))
	}
	cfg, err := config.LoadDefaultConfig(ctx, load...)
	if err != nil {
		return nil, fmt.Errorf("aws configuration: %w", err)
	}
	if cfg.Region == "" {
		return nil, errors.New("the region of the bucket is not known (hint: set the parameter region, or AWS_REGION)")
	}
	opts.Region = cfg.Region
	if cfg.Credentials != nil {
		cfg.Credentials = provider{cfg.Credentials}
	}
	cfg.HTTPClient = client{cfg.HTTPClient}
	s := &Storage{opts: opts, client: s3.NewFromConfig(cfg, func(o *s3.Options) {
		o.ClientLogMode = 0                               // which the environment could set to log credentials
		if opts.Endpoint == "" && o.BaseEndpoint != nil { // the environment names one
			_, err = endpoint.Check(*o.BaseEndpoint)
		}
		if opts.Endpoint != "" {
			o.BaseEndpoint, o.UsePathStyle = &opts.Endpoint, true
			// Others than Amazon may not know the checksums in trailers. What
			// is read is checked against a digest of our own anyway.
			o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
			o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
		}
	})}
	if err != nil {
		return nil, fmt.Errorf("aws configuration: %w", err)
	}
	if opts.Prefix != "" {
		s.prefix = opts.Prefix + "/"
	}
	if err := s.openBucket(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

func (o *Options) check() error {
	o.Prefix = strings.TrimSuffix(o.Prefix, "/")
	switch {
	case o.Bucket == "" || strings.ContainsAny(o.Bucket, "/:"):
		return errors.New("the bucket must be named, without slashes and colons")
	case strings.HasSuffix(o.Bucket, "--x-s3"):
		return errors.New("directory buckets do not list in order and cannot be used")
	case o.Prefix != "" && storage.CheckName(o.Prefix) != nil:
		return errors.New("the prefix must be made of letters, digits, dots, dashes, underscores and slashes")
	case o.Encryption != "" && o.Encryption != string(types.ServerSideEncryptionAes256) && o.Encryption != string(types.ServerSideEncryptionAwsKms):
		return errors.New("the encryption is AES256 or aws:kms, or left out")
	case o.Tags.Check() != nil:
		return o.Tags.Check()
	case o.KMSKey != "" && o.Encryption != string(types.ServerSideEncryptionAwsKms):
		return errors.New("a KMS key needs the encryption aws:kms")
	}
	if o.Endpoint == "" {
		return nil
	}
	_, err := endpoint.Check(o.Endpoint)
	return err
}

// openBucket demands that the bucket is there. It lists, because a refusal of
// HeadBucket does not say whether credentials or a permission are missing; the
// permission is the same.
func (s *Storage) openBucket(ctx context.Context) error {
	_, err := s.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{
		Bucket: &s.opts.Bucket, Prefix: optional(s.prefix), MaxKeys: aws.Int32(1), ExpectedBucketOwner: s.owner(),
	})
	err = s.explain("look for", err, "s3:ListBucket")
	switch {
	case !errors.Is(err, storage.ErrNoBucket):
		return err
	case !s.opts.CreateBucket:
		return fmt.Errorf("%w (hint: create it, or allow it with createBucket=true)", err)
	}
	in := &s3.CreateBucketInput{Bucket: &s.opts.Bucket}
	if s.opts.Region != "us-east-1" { // which S3 knows by being left out
		in.CreateBucketConfiguration = &types.CreateBucketConfiguration{LocationConstraint: types.BucketLocationConstraint(s.opts.Region)}
	}
	_, err = s.client.CreateBucket(ctx, in)
	var ours *types.BucketAlreadyOwnedByYou // another replica was faster
	if err != nil && !errors.As(err, &ours) {
		return s.explain("create", err, "s3:CreateBucket")
	}
	return nil
}

// Close gives nothing back: idle connections end by themselves.
func (s *Storage) Close() error { return nil }

func (s *Storage) owner() *string { return optional(s.opts.BucketOwner) }

func (s *Storage) key(name string) *string { return aws.String(s.prefix + name) }

// optional is nil for what is not set.
func optional(v string) *string {
	if v == "" {
		return nil
	}
	return &v
}
