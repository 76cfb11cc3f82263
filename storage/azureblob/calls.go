package azureblob

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/framed"
)

// apiVersion is the first that lists from a name on.
const apiVersion = "2026-02-06"

// send asks the service for something and returns its answer if it is a good
// one. The body of a GET of a blob is left to be read, and closed, by the caller.
func (s *Storage) send(ctx context.Context, method, key, query string, header http.Header, body []byte) (*http.Response, error) {
	target := s.container
	if key != "" {
		target += "/" + key // names need no escaping
	}
	if query != "" {
		target += "?" + query
	}
	req, err := runtime.NewRequest(ctx, method, target)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Raw().Header[k] = v
	}
	req.Raw().Header.Set("X-Ms-Version", apiVersion)
	if body != nil {
		if err := req.SetBody(streaming.NopCloser(bytes.NewReader(body)), "application/octet-stream"); err != nil {
			return nil, err
		}
	}
	if method == http.MethodGet && key != "" {
		runtime.SkipBodyDownload(req) // it is read only as far as an object may go
	}
	resp, err := s.pipeline.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode >= 300 {
		defer resp.Body.Close()
		return nil, answerOf(resp)
	}
	return resp, nil
}

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
	resp, err := s.send(ctx, http.MethodGet, s.prefix+name, "", nil, nil)
	if err != nil {
		return nil, "", "", s.explain("read "+name+" in", err, actions+"blobs/read")
	}
	defer resp.Body.Close()
	data, token, err = framed.Read(resp.Body)
	if err != nil && !errors.Is(err, storage.ErrCorrupt) && !errors.Is(err, storage.ErrTooLarge) {
		return nil, "", "", s.explain("read "+name+" in", err, "")
	}
	if etag = resp.Header.Get("ETag"); err == nil && etag == "" {
		err = errors.New("the service gave no ETag")
	}
	if err != nil {
		return nil, "", "", fmt.Errorf("%w: %s", err, name)
	}
	return data, token, etag, nil
}

// Put implements storage.Storage.
func (s *Storage) Put(ctx context.Context, name string, data []byte, expect storage.Version) (storage.Version, error) {
	if err := errors.Join(ctx.Err(), storage.CheckPut(name, data)); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	defer cancel()
	header := http.Header{"X-Ms-Blob-Type": {"BlockBlob"}}
	if s.opts.EncryptionScope != "" {
		header.Set("X-Ms-Encryption-Scope", s.opts.EncryptionScope)
	}
	permission := actions + "blobs/write"
	if tags := s.opts.Tags.Encode(); tags != "" {
		header.Set("X-Ms-Tags", tags)
		permission += " and " + actions + "blobs/tags/write"
	}
	if expect == storage.Absent {
		header.Set("If-None-Match", "*")
	} else if _, etag, ok := framed.SplitVersion(expect); ok {
		header.Set("If-Match", etag)
	} else {
		return "", storage.ErrConflict
	}
	body, token := framed.Frame(data)
	resp, err := s.send(ctx, http.MethodPut, s.prefix+name, "", header, body)
	if err == nil {
		if etag := resp.Header.Get("ETag"); etag != "" {
			return framed.JoinVersion(token, etag), nil
		}
		// Written, but what to expect next time is not known.
		return s.mine(ctx, name, token, errors.New("the service acknowledged a write without an ETag"))
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
// otherwise. azcore tries again when an answer is lost: the first try may have
// been written, and then the second one conflicts with it.
func (s *Storage) mine(ctx context.Context, name, token string, otherwise error) (storage.Version, error) {
	return framed.Settle(func() (string, string, error) {
		_, have, etag, err := s.get(ctx, name)
		return have, etag, err
	}, token, otherwise)
}

// Delete implements storage.Deleter.
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
	_, err = s.send(ctx, http.MethodDelete, s.prefix+name, "", http.Header{"If-Match": {etag}}, nil)
	if err = s.explain("delete "+name+" in", err, actions+"blobs/delete"); errors.Is(err, storage.ErrNotFound) {
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
	start, last := s.prefix+after, ""
	for marker := ""; len(names) < limit; {
		// One more than is wanted: the first may be the one to come after.
		out, err := s.page(ctx, prefix, start, marker, min(limit, 4999)+1)
		if err != nil {
			return nil, err
		}
		for _, b := range out.Blobs {
			name, ok := strings.CutPrefix(b.Name, s.prefix)
			if !ok || b.Name <= last || !strings.HasPrefix(name, prefix) {
				return nil, errors.New("the service does not list in order what was asked for")
			}
			if b.Type == "directory" {
				return nil, errors.New("the account has a hierarchical namespace and cannot be used")
			}
			last = b.Name
			if b.Name > start && storage.CheckName(name) == nil && len(names) < limit { // others may keep things beside ours
				names = append(names, name)
			}
		}
		if marker = out.NextMarker; marker == "" {
			break
		}
	}
	return names, nil
}

// blob is one entry of a list. All but the first two fields are for lists of versions.
type blob struct {
	Name     string
	Type     string `xml:"Properties>ResourceType"`
	Version  string `xml:"VersionId"`
	Current  string `xml:"IsCurrentVersion"` // true, or missing
	Snapshot string
	Deleted  string // true, or missing
	Days     string `xml:"Properties>RemainingRetentionDays"`
}

// listing is what is read of an answer to List Blobs.
type listing struct {
	Blobs      []blob `xml:"Blobs>Blob"`
	NextMarker string
}

// page asks for one page of a list, from the key start on.
func (s *Storage) page(ctx context.Context, prefix, start, marker string, size int) (*listing, error) {
	return s.list(ctx, map[string]string{"maxresults": strconv.Itoa(size), "prefix": s.prefix + prefix, "startFrom": start, "marker": marker})
}

// list asks for one page of a list with these parameters, without those that are empty.
func (s *Storage) list(ctx context.Context, parameters map[string]string) (*listing, error) {
	query := url.Values{"restype": {"container"}, "comp": {"list"}}
	for k, v := range parameters {
		if v != "" {
			query.Set(k, v)
		}
	}
	resp, err := s.send(ctx, http.MethodGet, "", query.Encode(), nil, nil)
	if err != nil {
		return nil, s.explain("list", err, actions+"blobs/read")
	}
	body, err := runtime.Payload(resp)
	if err != nil {
		return nil, s.explain("list", err, "")
	}
	var out listing
	if err := xml.Unmarshal(body, &out); err != nil {
		return nil, fmt.Errorf("the service's list cannot be read: %w", err)
	}
	return &out, nil
}
