package awss3

import (
	"context"
	"errors"
	"fmt"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/keyagent/keyagent/storage"
)

// Purge implements storage.Purger. A bucket that never had versioning keeps none; one with
// Object Lock refuses.
func (s *Storage) Purge(ctx context.Context, name string) (int, error) {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	old, err := s.earlier(ctx, name)
	if err != nil {
		return 0, err
	}
	for n, id := range old {
		_, err := s.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &s.opts.Bucket, Key: s.key(name), VersionId: &id, ExpectedBucketOwner: s.owner()})
		err = s.explain("delete a version of "+name+" in", err, "s3:DeleteObjectVersion (or Object Lock)")
		if err != nil && !errors.Is(err, storage.ErrNotFound) {
			return n, fmt.Errorf("%w: %d of %d: %w", storage.ErrKept, len(old)-n, len(old), err)
		}
	}
	return len(old), nil
}

// earlier lists the versions of an object that are not the latest. A version never becomes
// the latest again while there is a later one, so that what is listed stays what it is.
func (s *Storage) earlier(ctx context.Context, name string) (ids []string, err error) {
	key := *s.key(name)
	in := &s3.ListObjectVersionsInput{Bucket: &s.opts.Bucket, Prefix: &key, ExpectedBucketOwner: s.owner()}
	for {
		out, err := s.client.ListObjectVersions(ctx, in)
		if err != nil {
			return nil, s.explain("list the versions of "+name+" in", err, "s3:ListBucketVersions")
		}
		for _, v := range out.Versions {
			if aws.ToString(v.Key) == key && !aws.ToBool(v.IsLatest) {
				ids = append(ids, aws.ToString(v.VersionId))
			}
		}
		// In order of keys: behind this one come those that it is the beginning of.
		if !aws.ToBool(out.IsTruncated) || aws.ToString(out.NextKeyMarker) != key {
			return ids, nil
		}
		if aws.ToString(out.NextVersionIdMarker) == aws.ToString(in.VersionIdMarker) {
			return nil, errors.New("the service's list of versions does not go on")
		}
		in.KeyMarker, in.VersionIdMarker = out.NextKeyMarker, out.NextVersionIdMarker
	}
}
