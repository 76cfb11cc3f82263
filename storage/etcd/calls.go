package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/framed"
)

// pageSize bounds how many keys are asked for at once.
const pageSize = 1000

// Get implements storage.Storage.
func (s *Storage) Get(ctx context.Context, name string) ([]byte, storage.Version, error) {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return nil, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	data, token, revision, err := s.get(ctx, name)
	if err != nil {
		return nil, "", err
	}
	return data, version(token, revision), nil
}

func (s *Storage) get(ctx context.Context, name string) (data []byte, token string, revision int64, err error) {
	var out *clientv3.GetResponse
	err = s.do(ctx, "read "+name+" in", func(ctx context.Context, c *clientv3.Client) (err error) {
		out, err = c.Get(ctx, s.prefix+name)
		return err
	})
	switch {
	case err != nil:
		return nil, "", 0, err
	case len(out.Kvs) == 0:
		return nil, "", 0, storage.ErrNotFound
	}
	if data, token, err = framed.Read(bytes.NewReader(out.Kvs[0].Value)); err != nil {
		return nil, "", 0, fmt.Errorf("%w: %s", err, name)
	}
	return data, token, out.Kvs[0].ModRevision, nil
}

// Put implements storage.Storage.
func (s *Storage) Put(ctx context.Context, name string, data []byte, expect storage.Version) (storage.Version, error) {
	if err := errors.Join(ctx.Err(), storage.CheckPut(name, data)); err != nil {
		return "", err
	}
	key := s.prefix + name
	condition, ok := is(key, expect)
	if !ok {
		return "", storage.ErrConflict
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	body, token := framed.Frame(data)
	var out *clientv3.TxnResponse
	err := s.do(ctx, "write "+name+" in", func(ctx context.Context, c *clientv3.Client) (err error) {
		out, err = c.Txn(ctx).If(condition...).Then(clientv3.OpPut(key, string(body))).Commit()
		return err
	})
	switch {
	case errors.Is(err, storage.ErrUnavailable) && ctx.Err() == nil:
		// The SDK does not try a write again that may have been carried out. If
		// it was not, it may still be.
		if _, have, revision, failed := s.get(ctx, name); failed == nil && have == token {
			return version(token, revision), nil
		}
		return "", err
	case err != nil:
		return "", err
	case !out.Succeeded:
		return "", storage.ErrConflict
	}
	return version(token, out.Header.Revision), nil
}

// Delete implements storage.Deleter.
func (s *Storage) Delete(ctx context.Context, name string, expect storage.Version) error {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	key := s.prefix + name
	condition, ok := is(key, expect)
	if !ok || expect == storage.Absent {
		_, _, _, err := s.get(ctx, name)
		if err == nil {
			err = storage.ErrConflict
		}
		return err
	}
	var out *clientv3.TxnResponse
	err := s.do(ctx, "delete "+name+" in", func(ctx context.Context, c *clientv3.Client) (err error) {
		out, err = c.Txn(ctx).If(condition...).Then(clientv3.OpDelete(key)).Else(clientv3.OpGet(key, clientv3.WithKeysOnly())).Commit()
		return err
	})
	switch {
	case err != nil:
		return err
	case out.Succeeded:
		return nil
	case len(out.Responses[0].GetResponseRange().Kvs) == 0:
		return storage.ErrNotFound
	}
	return storage.ErrConflict
}

// Purge implements storage.Purger. A cluster keeps what a key was until it is compacted, as
// it is by kube-apiserver or by etcd's own settings, and that is of all keys: it is not done
// here.
func (s *Storage) Purge(ctx context.Context, name string) (int, error) {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	_, _, revision, err := s.get(ctx, name)
	if err != nil {
		return 0, err
	}
	var out *clientv3.GetResponse
	err = s.do(ctx, "read an earlier revision of "+name+" in", func(ctx context.Context, c *clientv3.Client) (err error) {
		if revision > 1 {
			out, err = c.Get(ctx, s.prefix+name, clientv3.WithRev(revision-1), clientv3.WithKeysOnly())
		}
		if errors.Is(err, rpctypes.ErrCompacted) {
			out, err = nil, nil
		}
		return err
	})
	switch {
	case err != nil:
		return 0, fmt.Errorf("%w, or it is not known: %w", storage.ErrKept, err)
	case out != nil && len(out.Kvs) > 0:
		return 0, fmt.Errorf("%w until the cluster is compacted", storage.ErrKept)
	}
	return 0, nil
}

// List implements storage.Storage.
func (s *Storage) List(ctx context.Context, prefix, after string, limit int) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	start, end := s.prefix+prefix, clientv3.GetPrefixRangeEnd(s.prefix+prefix)
	if s.prefix+prefix == "" {
		end = "\x00" // all keys there are
	}
	if after != "" {
		start = max(start, s.prefix+after+"\x00")
	}
	if start == "" {
		start = "\x00" // the first key there can be
	}
	var names []string
	for len(names) < limit {
		var out *clientv3.GetResponse
		err := s.do(ctx, "list", func(ctx context.Context, c *clientv3.Client) (err error) {
			out, err = c.Get(ctx, start, clientv3.WithRange(end), clientv3.WithKeysOnly(), clientv3.WithLimit(int64(min(limit-len(names), pageSize))))
			return err
		})
		if err != nil {
			return nil, err
		}
		for _, kv := range out.Kvs { // in order, which is how etcd keeps them
			key := string(kv.Key)
			name, ok := strings.CutPrefix(key, s.prefix)
			if !ok || key < start || !strings.HasPrefix(name, prefix) {
				return nil, errors.New("the cluster does not list in order what was asked for")
			}
			start = key + "\x00"
			if storage.CheckName(name) == nil { // others may keep things beside ours
				names = append(names, name)
			}
		}
		if len(out.Kvs) == 0 || !out.More {
			break
		}
	}
	return names, nil
}

func version(token string, revision int64) storage.Version {
	return framed.JoinVersion(token, strconv.FormatInt(revision, 10))
}

// is compares a key with a version, which is not ok if it is nobody's. The token
// is compared by the order of contents: there is no content with this token but
// those between what it begins with and the next that anything could begin with.
func is(key string, v storage.Version) (conditions []clientv3.Cmp, ok bool) {
	if v == storage.Absent {
		return []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", 0)}, true
	}
	token, compared, ok := framed.SplitVersion(v)
	revision, err := strconv.ParseInt(compared, 10, 64)
	if !ok || err != nil || revision <= 0 {
		return nil, false
	}
	start := framed.Start(token)
	return []clientv3.Cmp{
		clientv3.Compare(clientv3.ModRevision(key), "=", revision),
		clientv3.Compare(clientv3.Value(key), ">", start),
		clientv3.Compare(clientv3.Value(key), "<", clientv3.GetPrefixRangeEnd(start)),
	}, true
}
