package gcs

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"strconv"
	"strings"

	"google.golang.org/api/googleapi"
	api "google.golang.org/api/storage/v1"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/framed"
)

// Get implements storage.Storage. Whether the bucket or the object is missing
// the service does not say, so that an absent object costs a second request.
func (s *Storage) Get(ctx context.Context, name string) ([]byte, storage.Version, error) {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return nil, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	data, token, generation, err := s.get(ctx, name)
	if err != nil {
		return nil, "", err
	}
	return data, framed.JoinVersion(token, generation), nil
}

func (s *Storage) get(ctx context.Context, name string) (data []byte, token, generation string, err error) {
	err = s.try(ctx, func() error {
		out, err := s.service.Objects.Get(s.opts.Bucket, s.prefix+name).Context(ctx).Download()
		if err != nil {
			return s.explain("read "+name+" in", err, "storage.objects.get (or storage.objects.list, if the object is absent)")
		}
		defer out.Body.Close()
		generation = out.Header.Get("X-Goog-Generation")
		sum := crc32.New(castagnoli)
		data, token, err = framed.Read(io.TeeReader(out.Body, sum))
		switch {
		case errors.Is(err, storage.ErrCorrupt), errors.Is(err, storage.ErrTooLarge):
			return fmt.Errorf("%w: %s", err, name)
		case err != nil:
			return s.explain("read "+name+" in", err, "")
		case !sumMatches(out.Header, sum.Sum32()):
			return fmt.Errorf("%w: %s: its CRC32C is another", storage.ErrCorrupt, name)
		case generation == "":
			return errors.New("the service gave no generation")
		}
		return nil
	})
	if errors.Is(err, storage.ErrNotFound) {
		if bucket := s.askForBucket(ctx); bucket != nil {
			err = bucket
		}
	}
	return data, token, generation, err
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encodeSum is how the service writes a CRC32C.
func encodeSum(sum uint32) string {
	return base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, sum))
}

// sumMatches compares with the CRC32C in the header, if there is one.
func sumMatches(h http.Header, sum uint32) bool {
	for _, line := range h.Values("X-Goog-Hash") {
		for v := range strings.SplitSeq(line, ",") {
			if want, ok := strings.CutPrefix(strings.TrimSpace(v), "crc32c="); ok && want != encodeSum(sum) {
				return false
			}
		}
	}
	return true
}

// Put implements storage.Storage.
func (s *Storage) Put(ctx context.Context, name string, data []byte, expect storage.Version) (storage.Version, error) {
	if err := errors.Join(ctx.Err(), storage.CheckPut(name, data)); err != nil {
		return "", err
	}
	permission := "storage.objects.create"
	var generation int64 // 0 is that of an object that is not there
	if expect != storage.Absent {
		permission += " and storage.objects.delete"
		var ok bool
		if generation, ok = parseVersion(expect); !ok {
			return "", storage.ErrConflict
		}
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	body, token := framed.Frame(data)
	var out *api.Object
	err := s.try(ctx, func() (err error) {
		object := &api.Object{Name: s.prefix + name, ContentType: contentType, Crc32c: encodeSum(crc32.Checksum(body, castagnoli)), Metadata: s.opts.Tags}
		call := s.service.Objects.Insert(s.opts.Bucket, object).IfGenerationMatch(generation).Context(ctx).
			// One chunk, so that it is one request.
			Media(bytes.NewReader(body), googleapi.ContentType(contentType), googleapi.ChunkSize(googleapi.MinUploadChunkSize))
		if s.opts.KMSKey != "" {
			call.KmsKeyName(s.opts.KMSKey)
		}
		out, err = call.Do()
		return s.explain("write "+name+" in", err, permission)
	})
	switch {
	case err == nil && out.Generation != 0:
		return framed.JoinVersion(token, strconv.FormatInt(out.Generation, 10)), nil
	case err == nil: // written, but what to expect next time is not known
		return s.mine(ctx, name, token, errors.New("the service acknowledged a write without a generation"))
	case errors.Is(err, storage.ErrNotFound): // the bucket, or what was to be replaced
		return s.mine(ctx, name, token, storage.ErrConflict)
	case errors.Is(err, storage.ErrConflict):
		return s.mine(ctx, name, token, err)
	}
	return "", err
}

const contentType = "application/octet-stream"

// mine returns the version of an object if it is the one with this token, else
// otherwise. A write is tried again when its answer is lost: the first try may
// have been written, and then the second one conflicts with it.
func (s *Storage) mine(ctx context.Context, name, token string, otherwise error) (storage.Version, error) {
	return framed.Settle(func() (string, string, error) {
		_, have, generation, err := s.get(ctx, name)
		return have, generation, err
	}, token, otherwise)
}

// Delete implements storage.Deleter.
func (s *Storage) Delete(ctx context.Context, name string, expect storage.Version) error {
	if err := errors.Join(ctx.Err(), storage.CheckName(name)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	_, token, generation, err := s.get(ctx, name)
	if err != nil {
		return err
	}
	number, ok := parseVersion(expect)
	if !ok || framed.JoinVersion(token, generation) != expect {
		return storage.ErrConflict
	}
	err = s.try(ctx, func() error {
		err := s.service.Objects.Delete(s.opts.Bucket, s.prefix+name).IfGenerationMatch(number).Context(ctx).Do()
		return s.explain("delete "+name+" in", err, "storage.objects.delete")
	})
	if errors.Is(err, storage.ErrConflict) {
		// What is not there is in no generation.
		if _, _, _, now := s.get(ctx, name); errors.Is(now, storage.ErrNotFound) {
			err = now
		}
	}
	if errors.Is(err, storage.ErrNotFound) {
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
	last := s.prefix + after
	for token := ""; len(names) < limit; {
		// One more than is wanted: the first may be the one to come after.
		out, err := s.page(ctx, prefix, last, token, int64(min(limit, 999)+1))
		if err != nil {
			return nil, err
		}
		for _, o := range out.Items {
			name, ok := strings.CutPrefix(o.Name, s.prefix)
			if !ok || o.Name < last || !strings.HasPrefix(name, prefix) {
				return nil, errors.New("the service does not list in order what was asked for")
			}
			fresh := o.Name != last
			last = o.Name
			if fresh && storage.CheckName(name) == nil && len(names) < limit { // others may keep things beside ours
				names = append(names, name)
			}
		}
		if token = out.NextPageToken; token == "" {
			break
		}
	}
	return names, nil
}

// page asks for one page of a list, from the key start on.
func (s *Storage) page(ctx context.Context, prefix, start, token string, size int64) (out *api.Objects, err error) {
	err = s.try(ctx, func() error {
		call := s.service.Objects.List(s.opts.Bucket).Prefix(s.prefix+prefix).MaxResults(size).
			Fields("items/name", "nextPageToken").Context(ctx)
		if token != "" {
			call.PageToken(token)
		} else if start != "" {
			call.StartOffset(start)
		}
		out, err = call.Do()
		if err = s.explain("list", err, "storage.objects.list"); errors.Is(err, storage.ErrNotFound) {
			return fmt.Errorf("%w: %s", storage.ErrNoBucket, s.opts.Bucket)
		}
		return err
	})
	return out, err
}

// parseVersion returns the generation of a version that is from here.
func parseVersion(v storage.Version) (generation int64, ok bool) {
	_, compared, ok := framed.SplitVersion(v)
	generation, err := strconv.ParseInt(compared, 10, 64)
	return generation, ok && err == nil && generation > 0
}
