package keyservice

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/revocation"
	"github.com/keyagent/keyagent/internal/volume"
)

// AdminClient asks a key service that runs, on its admin socket.
type AdminClient struct {
	path string
	http *http.Client
}

// NewAdminClient returns a client of the socket at path. It connects to nothing yet.
func NewAdminClient(path string) *AdminClient {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}
	return &AdminClient{path, &http.Client{Transport: &http.Transport{DialContext: dial}}}
}

// Close gives its connections back.
func (c *AdminClient) Close() error { c.http.CloseIdleConnections(); return nil }

// Running reports whether a key service listens on the socket.
func (c *AdminClient) Running(ctx context.Context) bool {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", c.path)
	return err == nil && conn.Close() == nil
}

func (c *AdminClient) post(ctx context.Context, verb string, in adminRequest) (*http.Response, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://admin/v1/"+verb, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, failure.New(failure.Unreachable, fmt.Errorf("the key service's admin socket %s: %w", c.path, err), "does keyagent serve run, with admin: in its configuration?")
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM), errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return nil, failure.New(failure.PolicyDenied, fmt.Errorf("the key service's admin socket %s: %w", c.path, err), "it is for root, and for the key service's own user")
	case err != nil:
		return nil, failure.New(failure.Unreachable, err, "")
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	var refused adminError
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&refused); err != nil {
		return nil, failure.Newf(failure.Unreachable, "is this keyagent of the same version as the service?", "the key service answers with %s", resp.Status)
	}
	return nil, refused.failure()
}

func (e adminError) failure() error {
	return &failure.Error{Class: e.Class, CorrelationID: e.CorrelationID, Hint: e.Hint, Err: errors.New(e.Message)}
}

func answer[T any](ctx context.Context, c *AdminClient, verb string, in adminRequest) (out T, err error) {
	resp, err := c.post(ctx, verb, in)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		return out, failure.New(failure.Unreachable, fmt.Errorf("answer of the key service: %w", err), "")
	}
	return out, nil
}

// Status is [Admin.Status].
func (c *AdminClient) Status(ctx context.Context) (*Status, error) {
	return answer[*Status](ctx, c, "status", adminRequest{})
}

// Rewrap is [Admin.Rewrap]. It reports once, at its end.
func (c *AdminClient) Rewrap(ctx context.Context, report func(macstore.Progress)) (macstore.Progress, error) {
	p, err := answer[macstore.Progress](ctx, c, "rewrap", adminRequest{})
	if err == nil && report != nil {
		report(p)
	}
	return p, err
}

// Export is [Admin.Export].
func (c *AdminClient) Export(ctx context.Context, w io.Writer, recipient []byte, _ func(macstore.Progress)) (digest string, p macstore.Progress, err error) {
	resp, err := c.post(ctx, "export", adminRequest{Recipient: recipient})
	if err != nil {
		return "", p, err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return "", p, failure.New(failure.Unreachable, err, "")
	}
	if text := resp.Trailer.Get(trailerError); text != "" {
		var refused adminError
		if err = json.Unmarshal([]byte(text), &refused); err == nil {
			err = refused.failure()
		}
	}
	return resp.Trailer.Get(trailerDigest), p, errors.Join(err, json.Unmarshal([]byte(resp.Trailer.Get(trailerRecords)), &p))
}

// Checkpoint is [Service.Checkpoint].
func (c *AdminClient) Checkpoint(ctx context.Context) (Checkpoint, error) {
	return answer[Checkpoint](ctx, c, "checkpoint", adminRequest{})
}

// Volumes lists all volumes.
func (c *AdminClient) Volumes(ctx context.Context) ([]VolumeInfo, error) {
	all := []VolumeInfo{}
	for after := ""; ; after = all[len(all)-1].Volume {
		page, err := answer[[]VolumeInfo](ctx, c, "list", adminRequest{After: after})
		if err != nil || len(page) == 0 {
			return all, err
		}
		all = append(all, page...)
	}
}

// Do asks for a verb on one volume: show, retire, reset, takeover, accept-restore.
func (c *AdminClient) Do(ctx context.Context, verb, id string) (VolumeInfo, error) {
	return answer[VolumeInfo](ctx, c, verb, adminRequest{Volume: id})
}

// Rotate has the key of a volume changed, and again every so often unless that is zero.
func (c *AdminClient) Rotate(ctx context.Context, id string, every time.Duration) (VolumeInfo, error) {
	return answer[VolumeInfo](ctx, c, "rotate", adminRequest{Volume: id, EveryS: int64(every / time.Second)})
}

// AbandonRotation is [Service.AbandonRotation].
func (c *AdminClient) AbandonRotation(ctx context.Context, id string, force bool) (VolumeInfo, error) {
	return answer[VolumeInfo](ctx, c, "abandon-rotation", adminRequest{Volume: id, Force: force})
}

// Revoke is [Service.Revoke].
func (c *AdminClient) Revoke(ctx context.Context, s revocation.Subject, reason string, lift bool) (revocation.Word, error) {
	verb := map[bool]string{false: "revoke", true: "lift"}[lift]
	return answer[revocation.Word](ctx, c, verb, adminRequest{Subject: &s, Reason: reason})
}

// Revocations lists what is revoked.
func (c *AdminClient) Revocations(ctx context.Context) ([]revocation.Word, error) {
	return answer[[]revocation.Word](ctx, c, "revocations", adminRequest{})
}

// RecoverRequest is [Service.RecoverRequest].
func (c *AdminClient) RecoverRequest(ctx context.Context, id, reason, recipient string, version uint32, window time.Duration) ([]byte, error) {
	return answer[[]byte](ctx, c, "recover-request", adminRequest{Volume: id, Reason: reason, To: recipient, Version: version, WindowS: int64(window / time.Second)})
}

// Recover is [Service.Recover].
func (c *AdminClient) Recover(ctx context.Context, request []byte, approvals [][]byte) ([]byte, error) {
	return answer[[]byte](ctx, c, "recover", adminRequest{Request: request, Approvals: approvals})
}

// Restored lists the volumes that storage shows in an older state.
func (c *AdminClient) Restored(ctx context.Context) ([]volume.Restored, error) {
	return answer[[]volume.Restored](ctx, c, "restored", adminRequest{})
}

// Import makes the record of a volume anew.
func (c *AdminClient) Import(ctx context.Context, l Lost) (VolumeInfo, error) {
	return answer[VolumeInfo](ctx, c, "import", adminRequest{Lost: &l})
}
