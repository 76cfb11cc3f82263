package awss3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/framed"
)

// Get implements storage.Storage.
func (s *Storage) Get(ctx context.Context, name string) ([]byte, storage.Version, error) {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return nil, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	data, token, etag, err := s.get(ctx, name)
	if err != nil {
		return nil, "", err
	}
	return data, framed.JoinVersion(token, etag), nil
}

func (s *Storage) get(ctx context.Context, name string) (data []byte, token, etag string, err error) {
	out, err := s.client.GetObject(ctx, &s3.GetObjectInput{Bucket: &s.opts.Bucket, Key: s.key(name), ExpectedBucketOwner: s.owner()})
	if err != nil {
		return nil, "", "", s.explain("read "+name+" in", err, "s3:GetObject (or s3:ListBucket, if the object is absent)")
	}
	defer out.Body.Close()
	data, token, err = framed.Read(out.Body)
	if err != nil && !errors.Is(err, storage.ErrCorrupt) && !errors.Is(err, storage.ErrTooLarge) {
		return nil, "", "", s.explain("read "+name+" in", err, "")
	}
	if err == nil && aws.ToString(out.ETag) == "" {
		err = errors.New("the service gave no ETag")
	}
	if err != nil {
		return nil, "", "", fmt.Errorf("%w: %s", err, name)
	}
	return data, token, *out.ETag, nil
}

// Put implements storage.Storage.
func (s *Storage) Put(ctx context.Context, name string, data []byte, expect storage.Version) (storage.Version, error) {
	if err := errors.Join(ctx.Err(), storage.CheckPut(name, data)); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	body, token := framed.Frame(data)
	in := &s3.PutObjectInput{
		Bucket: &s.opts.Bucket, Key: s.key(name), Body: bytes.NewReader(body), ExpectedBucketOwner: s.owner(),
		ContentType:          aws.String("application/octet-stream"),
		ServerSideEncryption: types.ServerSideEncryption(s.opts.Encryption), SSEKMSKeyId: optional(s.opts.KMSKey),
		Tagging: optional(s.opts.Tags.Encode()),
	}
	if expect == storage.Absent {
		in.IfNoneMatch = aws.String("*")
	} else if _, etag, ok := framed.SplitVersion(expect); ok {
		in.IfMatch = &etag
	} else {
		return "", storage.ErrConflict
	}
	out, err := s.client.PutObject(ctx, in)
	switch {
	case err == nil && aws.ToString(out.ETag) != "":
		return framed.JoinVersion(token, *out.ETag), nil
	case err == nil: // written, but what to expect next time is not known
		return s.mine(ctx, name, token, errors.New("the service acknowledged a write without an ETag"))
	}
	permission := "s3:PutObject"
	if len(s.opts.Tags) > 0 {
		permission += " and s3:PutObjectTagging"
	}
	err = s.explain("write "+name+" in", err, permission)
	switch {
	case errors.Is(err, storage.ErrNotFound): // it was to be there
		return s.mine(ctx, name, token, storage.ErrConflict)
	case errors.Is(err, storage.ErrConflict):
		return s.mine(ctx, name, token, err)
	}
	return "", err
}

// mine returns the version of an object if it is the one with this token, else
// otherwise. The SDK tries again when an answer is lost: the first try may have
// been written, and then the second one conflicts with it.
func (s *Storage) mine(ctx context.Context, name, token string, otherwise error) (storage.Version, error) {
	return framed.Settle(func() (string, string, error) {
		_, have, etag, err := s.get(ctx, name)
		return have, etag, err
	}, token, otherwise)
}

// Delete implements storage.Deleter. It reads the object first, and then deletes
// it on the condition that its ETag is still the same. A service that does not
// know this condition may delete what another writer wrote in between.
func (s *Storage) Delete(ctx context.Context, name string, expect storage.Version) error {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	_, token, etag, err := s.get(ctx, name)
	if err != nil {
		return err
	}
	if framed.JoinVersion(token, etag) != expect {
		return storage.ErrConflict
	}
	_, err = s.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &s.opts.Bucket, Key: s.key(name), IfMatch: &etag, ExpectedBucketOwner: s.owner()})
	if err = s.explain("delete "+name+" in", err, "s3:DeleteObject"); errors.Is(err, storage.ErrNotFound) {
		return nil // it was there a moment ago: an earlier try, or somebody else with the same wish
	}
	return err
}

// List implements storage.Storage.
func (s *Storage) List(ctx context.Context, prefix, after string, limit int) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	var names []string
	for start := s.prefix + after; len(names) < limit; {
		out, err := s.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{
			Bucket: &s.opts.Bucket, Prefix: aws.String(s.prefix + prefix), StartAfter: optional(start),
			MaxKeys: aws.Int32(int32(min(limit, 1000))), ExpectedBucketOwner: s.owner(),
		})
		if err != nil {
			return nil, s.explain("list", err, "s3:ListBucket")
		}
		for _, o := range out.Contents {
			key := aws.ToString(o.Key)
			name, ok := strings.CutPrefix(key, s.prefix)
			if !ok || key <= start || !strings.HasPrefix(name, prefix) {
				return nil, errors.New("the service does not list in order what was asked for")
			}
			start = key
			if storage.CheckName(name) == nil && len(names) < limit { // others may keep things beside ours
				names = append(names, name)
			}
		}
		if len(out.Contents) == 0 || !aws.ToBool(out.IsTruncated) {
			break
		}
	}
	return names, nil
}
