//go:build !keyagent_noaws

package setup

import (
	"context"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage/awss3"
)

func awsStorage(ctx context.Context, u *kms.URI) (store, error) {
	opts := awss3.Options{
		Prefix: u.Optional("prefix"), Region: u.Optional("region"), Endpoint: u.Optional("endpoint"),
		BucketOwner: u.Optional("bucketOwner"), Encryption: u.Optional("encryption"), KMSKey: u.Optional("kmsKey"),
	}
	var err error
	if opts.Bucket, err = u.Required("bucket"); err != nil {
		return nil, err
	}
	if opts.CreateBucket, err = flag(u, "createBucket"); err != nil {
		return nil, err
	}
	if opts.Credentials, err = awsCredentials(u); err != nil {
		return nil, err
	}
	if err := u.Done(); err != nil {
		return nil, err
	}
	s, err := awss3.New(ctx, opts)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// awsReread is how long a key that came from a file is used before the file is
// read again.
const awsReread = 5 * time.Minute

// awsCredentials are nil, for the SDK's default chain, if the URI names none.
func awsCredentials(u *kms.URI) (aws.CredentialsProvider, error) {
	id, err := credential(u, "accessKeyID")
	if err != nil {
		return nil, err
	}
	key, err := credential(u, "accessKey")
	if err != nil {
		return nil, err
	}
	switch {
	case id == nil && key == nil:
		return nil, nil
	case id == nil || key == nil:
		return nil, fmt.Errorf("%w: %s://%s needs the parameters accessKeyID and accessKey together (each also as …File or …Credential)", kms.ErrURI, u.Scheme, u.Name)
	}
	return aws.NewCredentialsCache(aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		c := aws.Credentials{Source: "keyagent", CanExpire: true, Expires: time.Now().Add(awsReread)}
		var err error
		if c.AccessKeyID, err = id(); err != nil {
			return aws.Credentials{}, err
		}
		c.SecretAccessKey, err = key()
		return c, err
	})), nil
}
