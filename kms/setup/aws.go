//go:build !keyagent_noaws

package setup

import (
	"context"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/keyagent/keyagent/kms"
	awskms "github.com/keyagent/keyagent/kms/aws"
	"github.com/keyagent/keyagent/storage/awss3"
)

func awsKMS(ctx context.Context, u *kms.URI) (Keys, error) {
	opts := awskms.Options{Region: u.Optional("region"), Endpoint: u.Optional("endpoint"), OldKeys: list(u, "oldKeys")}
	if err := required(u, map[string]*string{"keyName": &opts.Key}); err != nil {
		return nil, err
	}
	if text := u.Optional("attestationCommand"); text != "" {
		opts.Attester = documentCommand(text)
	}
	var err error
	if opts.Credentials, err = awsCredentials(u); err != nil {
		return nil, err
	}
	if err := u.Done(); err != nil {
		return nil, err
	}
	return opened[Keys](awskms.New(ctx, opts))
}

func awsStorage(ctx context.Context, u *kms.URI) (Objects, error) {
	opts := awss3.Options{
		Prefix: u.Optional("prefix"), Region: u.Optional("region"), Endpoint: u.Optional("endpoint"),
		BucketOwner: u.Optional("bucketOwner"), Encryption: u.Optional("encryption"), KMSKey: u.Optional("kmsKey"),
	}
	if err := required(u, map[string]*string{"bucket": &opts.Bucket}); err != nil {
		return nil, err
	}
	var err error
	if opts.CreateBucket, err = flag(u, "createBucket"); err != nil {
		return nil, err
	}
	if opts.Tags, err = tags(u); err != nil {
		return nil, err
	}
	if opts.Credentials, err = awsCredentials(u); err != nil {
		return nil, err
	}
	if err := u.Done(); err != nil {
		return nil, err
	}
	return opened[Objects](awss3.New(ctx, opts))
}

// awsReread is how long a key that came from a file is used before the file is
// read again.
const awsReread = 5 * time.Minute

// awsCredentials are nil, for the SDK's default chain, if the URI names none.
func awsCredentials(u *kms.URI) (aws.CredentialsProvider, error) {
	var c struct{ id, key, session func() (string, error) }
	for name, to := range map[string]*func() (string, error){"accessKeyID": &c.id, "accessKey": &c.key, "sessionToken": &c.session} {
		var err error
		if *to, err = credential(u, name); err != nil {
			return nil, err
		}
	}
	switch {
	case c.id == nil && c.key == nil && c.session == nil:
		return nil, nil
	case c.id == nil || c.key == nil:
		return nil, fmt.Errorf("%w: %s://%s needs the parameters accessKeyID and accessKey together (each also as …File or …Credential)", kms.ErrURI, u.Scheme, u.Name)
	}
	return aws.NewCredentialsCache(aws.CredentialsProviderFunc(func(context.Context) (out aws.Credentials, err error) {
		out = aws.Credentials{Source: "keyagent", CanExpire: true, Expires: time.Now().Add(awsReread)}
		if out.AccessKeyID, err = c.id(); err != nil {
			return aws.Credentials{}, err
		}
		if out.SecretAccessKey, err = c.key(); err != nil {
			return aws.Credentials{}, err
		}
		if c.session != nil {
			out.SessionToken, err = c.session()
		}
		return out, err
	})), nil
}
