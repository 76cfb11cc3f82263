// Package aws is a KMS over the AWS Key Management Service: DEKs are random, and
// encrypted by a symmetric key that never leaves the service.
//
// The binding is the encryption context of each call, which the service
// authenticates and writes to CloudTrail in plain text:
//
//	domain   keyagent aws kms v1
//	volume   the volume's ID
//	purpose  volume-dek or record-mac
//	version  of the DEK, decimal
//	length   of the DEK in bytes, decimal
//
// Anyone who can write the storage must not choose the key. A wrapped key therefore
// opens only under [Options].Key or one of Options.OldKeys, and the call names
// that key; the service is never left to find it in the ciphertext. A
// multi-Region key is the same key in each of its Regions, and has one name in
// Wrapped.KEK, with a * in the place of the Region. When the service rotates the
// material of a key, its ARN stays, and so does Wrapped.KEK.
//
// The permissions that are needed: kms:DescribeKey and kms:Encrypt on Key,
// kms:Decrypt on Key and on each of OldKeys.
//
// With an [Attester] the service encrypts its answer to a key that an
// attestation document vouches for, so that its key policy can demand
// measurements (kms:RecipientAttestation:PCR4 and others). A public key says
// nothing of who encrypted to it: it is TLS that says the answer is Amazon's.
//
// The SDK copies what it sends and receives. The copies that this package
// cannot reach to wipe stay until the garbage collector reuses them; with an
// Attester, what is received holds no key in plain text.
//
// The format is specified in docs/spec/keys.md.
package aws

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	service "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go/logging"

	"github.com/keyagent/keyagent/internal/endpoint"
	"github.com/keyagent/keyagent/kms"
)

// Options configure [New]. Key must be set.
type Options struct {
	// Key that wraps: its ID, its ARN, alias/NAME or the ARN of an alias. An
	// alias is followed when it is moved to another key of the same account.
	Key string
	// OldKeys are further keys under which wrapped keys may be opened, each by
	// its ARN, or by its ID if it is of the same account as Key. An alias is
	// refused: it would open what its next target wrapped. Default none.
	OldKeys []string
	// Region of the service; default that of Key if it is an ARN, else what the
	// SDK finds in its environment.
	Region string
	// Endpoint is the URL of the service; default Amazon's, or what the SDK finds
	// in its environment. It is https, or http on a loopback address.
	Endpoint string
	// Credentials; nil is the SDK's default chain.
	Credentials awssdk.CredentialsProvider
	// Attester, if it is set, has the service encrypt each key that it opens to
	// a key of this process.
	Attester Attester
	// Timeout bounds one call with all its retries; default 30s.
	Timeout time.Duration
	// Attempts bounds how often one call is tried; default 4. The SDK's
	// budget of retries bounds them over all calls.
	Attempts int
}

// maxAnswer bounds an answer in bytes.
const maxAnswer = 256 << 10

// Attester vouches for a public key, as a Nitro enclave or a NitroTPM does.
type Attester interface {
	// Document returns an attestation document over an RSA key in the DER form
	// of its SubjectPublicKeyInfo. It is asked for each key that is opened,
	// because the service accepts a document for a few minutes only.
	Document(ctx context.Context, publicKeyDER []byte) ([]byte, error)
}

// KMS wraps keys by a key of the service.
type KMS struct {
	opts      Options
	client    *service.Client
	transport *http.Transport
	recipient *recipient // nil without an Attester
	closed    atomic.Bool

	mu      sync.Mutex
	current arn   // what Key is at the moment
	old     []arn // of OldKeys
}

var (
	_ kms.KMS   = (*KMS)(nil)
	_ kms.Namer = (*KMS)(nil)
)

var errClosed = fmt.Errorf("aws kms: %w", kms.ErrClosed)

// New asks the service which key Options.Key is, and demands that it can
// encrypt and decrypt.
func New(ctx context.Context, opts Options) (*KMS, error) {
	if err := opts.check(); err != nil {
		return nil, err
	}
	named, isARN := parseAnyARN(opts.Key)
	region := opts.Region
	if region == "" && isARN {
		region = named.region
	}
	if opts.Timeout == 0 {
		opts.Timeout = 30 * time.Second
	}
	if opts.Attempts == 0 {
		opts.Attempts = 4
	}
	load := []func(*config.LoadOptions) error{
		config.WithHTTPClient(awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
			t.TLSClientConfig.MinVersion = tls.VersionTLS12
			t.ResponseHeaderTimeout = opts.Timeout
		})),
		config.WithLogger(logging.Nop{}), // errors are returned
		config.WithRetryer(func() awssdk.Retryer {
			return retry.NewStandard(func(o *retry.StandardOptions) {
				o.MaxAttempts = opts.Attempts
				o.MaxBackoff = 5 * time.Second
			})
		}),
	}
	if region != "" {
		load = append(load, config.WithRegion(region))
	}
	if opts.Credentials != nil {
		load = append(load, config.WithCredentialsProvider(opts.Credentials))
	}
	loading, cancel := context.WithTimeout(ctx, opts.Timeout)
	defer cancel()
	cfg, err := config.LoadDefaultConfig(loading, load...)
	switch {
	case err != nil:
		return nil, fmt.Errorf("aws configuration: %w", err)
	case cfg.Region == "":
		return nil, errors.New("the region of the key is not known (hint: set the parameter region, or AWS_REGION)")
	case isARN && named.region != cfg.Region:
		return nil, fmt.Errorf("the key is of region %s, the service of %s", named.region, cfg.Region)
	case cfg.Credentials == nil:
		return nil, fmt.Errorf("%w: none are configured", kms.ErrCredentials)
	}
	opts.Region = cfg.Region
	k := &KMS{opts: opts}
	if client, ok := cfg.HTTPClient.(*awshttp.BuildableClient); ok {
		k.transport = client.GetTransport() // with the roots that the environment may name
	} else {
		return nil, errors.New("aws configuration: it has a client of another kind")
	}
	// The SDK's own client follows some redirects, which could send a key
	// elsewhere.
	cfg.HTTPClient = &http.Client{Transport: endpoint.Limit(k.transport, maxAnswer), CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	cfg.Credentials = credentials{cfg.Credentials}
	k.client = service.NewFromConfig(cfg, func(o *service.Options) {
		if opts.Endpoint != "" {
			o.BaseEndpoint = &opts.Endpoint
		} else if o.BaseEndpoint != nil { // the environment names one
			_, err = endpoint.Check(*o.BaseEndpoint)
		}
		o.ClientLogMode = 0 // which could be set to log bodies, with keys in them
	})
	if err != nil {
		return nil, fmt.Errorf("aws configuration: %w", err)
	}
	if k.current, err = k.resolve(ctx, opts.Key); err != nil {
		return nil, err
	}
	if k.old, err = oldKeys(opts.OldKeys, k.current); err != nil {
		return nil, err
	}
	if opts.Attester != nil {
		if k.recipient, err = newRecipient(opts.Attester); err != nil {
			return nil, err
		}
	}
	return k, nil
}

func (o *Options) check() error {
	switch _, isARN := parseAnyARN(o.Key); {
	case o.Key == "":
		return errors.New("the key must be set")
	case !isARN && !idPattern.MatchString(o.Key) && !aliasPattern.MatchString(o.Key):
		return errors.New("the key must be an ID, alias/NAME, or the ARN of a key or an alias")
	case len(o.OldKeys) > 100:
		return errors.New("there are more than 100 old keys")
	case o.Timeout < 0 || o.Attempts < 0:
		return errors.New("timeout and attempts cannot be negative")
	}
	if slices.ContainsFunc(o.OldKeys, func(old string) bool {
		_, isKey := parseARN(old)
		return !isKey && !idPattern.MatchString(old)
	}) {
		return errors.New("each old key must be the ID or the ARN of a key")
	}
	if o.Endpoint == "" {
		return nil
	}
	_, err := endpoint.Check(o.Endpoint)
	return err
}

// Close wipes the key that answers are encrypted to. Calls fail afterwards.
func (k *KMS) Close() error {
	k.closed.Store(true)
	k.transport.CloseIdleConnections()
	if k.recipient != nil {
		return k.recipient.key.Close()
	}
	return nil
}

// resolve asks the service for the ARN of a key, and whether it can be used.
func (k *KMS) resolve(ctx context.Context, key string) (arn, error) {
	calling, cancel := context.WithTimeout(ctx, k.opts.Timeout)
	defer cancel()
	out, err := k.client.DescribeKey(calling, &service.DescribeKeyInput{KeyId: &key})
	if err != nil {
		return arn{}, k.explain(ctx, "describe", err)
	}
	m := out.KeyMetadata
	if m == nil {
		return arn{}, fmt.Errorf("%w: aws kms described no key", kms.ErrUnavailable)
	}
	a, ok := parseARN(awssdk.ToString(m.Arn))
	switch {
	case !ok || a.region != k.opts.Region:
		return arn{}, fmt.Errorf("%w: aws kms described a key that is not of region %s", kms.ErrUnavailable, k.opts.Region)
	case !names(key, a):
		return arn{}, fmt.Errorf("%w: aws kms described another key than %s", kms.ErrUnavailable, key)
	case m.KeyUsage != types.KeyUsageTypeEncryptDecrypt || m.KeySpec != types.KeySpecSymmetricDefault:
		return arn{}, fmt.Errorf("%w: %s is of usage %s and kind %s (hint: it must be ENCRYPT_DECRYPT and SYMMETRIC_DEFAULT)", kms.ErrKEK, a, m.KeyUsage, m.KeySpec)
	case m.KeyState != types.KeyStateEnabled:
		return arn{}, fmt.Errorf("%w: %s is in state %s (hint: it must be Enabled)", kms.ErrKEK, a, m.KeyState)
	}
	return a, nil
}

// oldKeys reads Options.OldKeys. An ID is of the account of the current key.
func oldKeys(list []string, current arn) ([]arn, error) {
	var old []arn
	for _, text := range list {
		a, ok := parseARN(text)
		if !ok {
			a = current
			a.id = text
		}
		if a.partition != current.partition || a.region != current.region && !a.multiRegion() {
			return nil, fmt.Errorf("the old key %s is of another region than %s", a, current.region)
		}
		a.region = current.region
		old = append(old, a)
	}
	return old, nil
}

// isAlias reports whether Options.Key can become another key.
func (k *KMS) isAlias() bool { return strings.Contains(k.opts.Key, "alias/") }
