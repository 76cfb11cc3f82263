package azureblob

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/keyagent/keyagent/storage"
)

// Purge implements storage.Purger: earlier versions and snapshots go. What the account's
// soft delete keeps of them cannot be destroyed before its time: [storage.ErrKept].
func (s *Storage) Purge(ctx context.Context, name string) (int, error) {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	old, _, err := s.earlier(ctx, name)
	if err != nil {
		return 0, err
	}
	for n, b := range old {
		query := url.Values{"snapshot": {b.Snapshot}}
		if b.Snapshot == "" {
			query = url.Values{"versionid": {b.Version}}
		}
		_, err := s.send(ctx, http.MethodDelete, s.prefix+name, query.Encode(), nil, nil)
		err = s.explain("delete a version of "+name+" in", err, actions+"blobs/deleteBlobVersion/action and "+actions+"blobs/delete (or an immutability policy)")
		if err != nil && !errors.Is(err, storage.ErrNotFound) {
			return n, fmt.Errorf("%w: %d of %d: %w", storage.ErrKept, len(old)-n, len(old), err)
		}
	}
	_, deleted, err := s.earlier(ctx, name)
	if err != nil {
		return len(old), fmt.Errorf("%w, or it is not known: %w", storage.ErrKept, err)
	}
	if len(deleted) > 0 {
		return len(old), fmt.Errorf("%w: %d, by the account's soft delete for up to %.10s days", storage.ErrKept, len(deleted), longest(deleted))
	}
	return len(old), nil
}

func longest(deleted []blob) (days string) {
	for _, b := range deleted {
		if len(b.Days) > len(days) || len(b.Days) == len(days) && b.Days > days {
			days = b.Days
		}
	}
	return days
}

// earlier lists what is kept of a blob beside its present version, and of that apart what
// was deleted and is kept all the same.
func (s *Storage) earlier(ctx context.Context, name string) (old, deleted []blob, err error) {
	parameters := map[string]string{"prefix": s.prefix + name, "include": "snapshots,versions,deleted"}
	for {
		out, err := s.list(ctx, parameters)
		if err != nil {
			return nil, nil, err
		}
		past := false
		for _, b := range out.Blobs {
			switch past = b.Name > s.prefix+name; {
			case b.Name != s.prefix+name:
			case b.Deleted == "true":
				deleted = append(deleted, b)
			case b.Snapshot != "" || b.Version != "" && b.Current != "true":
				old = append(old, b)
			}
		}
		if out.NextMarker == "" || past || out.NextMarker == parameters["marker"] {
			return old, deleted, nil
		}
		parameters["marker"] = out.NextMarker
	}
}
