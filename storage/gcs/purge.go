package gcs

import (
	"context"
	"errors"
	"fmt"

	api "google.golang.org/api/storage/v1"

	"github.com/keyagent/keyagent/storage"
)

// Purge implements storage.Purger. What the bucket's soft delete policy keeps cannot be
// destroyed before its time: [storage.ErrKept].
func (s *Storage) Purge(ctx context.Context, name string) (int, error) {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	old, err := s.versions(ctx, name, func(c *api.ObjectsListCall) { c.Versions(true) }, func(o *api.Object) bool { return o.TimeDeleted != "" })
	if err != nil {
		return 0, err
	}
	for n, o := range old {
		err := s.try(ctx, func() error {
			err := s.service.Objects.Delete(s.opts.Bucket, o.Name).Generation(o.Generation).Context(ctx).Do()
			return s.explain("delete a version of "+name+" in", err, "storage.objects.delete (or a retention policy)")
		})
		if err != nil && !errors.Is(err, storage.ErrNotFound) {
			return n, fmt.Errorf("%w: %d of %d: %w", storage.ErrKept, len(old)-n, len(old), err)
		}
	}
	soft, err := s.versions(ctx, name, func(c *api.ObjectsListCall) { c.SoftDeleted(true) }, func(o *api.Object) bool { return o.HardDeleteTime != "" })
	if err != nil {
		return len(old), fmt.Errorf("%w, or it is not known: %w", storage.ErrKept, err)
	}
	until := ""
	for _, o := range soft {
		until = max(until, o.HardDeleteTime)
	}
	if until != "" {
		return len(old), fmt.Errorf("%w: %d, by the bucket's soft delete policy until %.40s", storage.ErrKept, len(soft), until)
	}
	return len(old), nil
}

// versions lists those versions of one object that are wanted.
func (s *Storage) versions(ctx context.Context, name string, which func(*api.ObjectsListCall), wanted func(*api.Object) bool) (found []*api.Object, err error) {
	for token := ""; ; {
		var out *api.Objects
		err := s.try(ctx, func() (err error) {
			// The end is the first name that is not this one.
			call := s.service.Objects.List(s.opts.Bucket).Prefix(s.prefix+name).EndOffset(s.prefix+name+"\x00").
				Fields("items(name,generation,timeDeleted,hardDeleteTime)", "nextPageToken").Context(ctx)
			if which(call); token != "" {
				call.PageToken(token)
			}
			out, err = call.Do()
			return s.explain("list the versions of "+name+" in", err, "storage.objects.list")
		})
		if err != nil {
			return nil, err
		}
		for _, o := range out.Items {
			if o.Name == s.prefix+name && wanted(o) {
				found = append(found, o)
			}
		}
		if out.NextPageToken == "" || out.NextPageToken == token {
			return found, nil
		}
		token = out.NextPageToken
	}
}
