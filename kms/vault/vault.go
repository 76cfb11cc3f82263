// Package vault is a KMS over the transit engine of HashiCorp Vault or OpenBao:
// DEKs are random, and wrapped by a key that never leaves the server.
//
// The key must be of a type with associated data (aes256-gcm96, the default of
// transit, or chacha20-poly1305); the binding is that data, so that a wrapped
// key that was moved does not open. The documented HTTP API is spoken directly:
// two calls do not need a client library. The policy of the token needs
//
//	path "MOUNT/encrypt/KEY" { capabilities = ["update"] }
//	path "MOUNT/decrypt/KEY" { capabilities = ["update"] }
//	path "MOUNT/keys/KEY"    { capabilities = ["read"] }   # to tell which version is in force
package vault

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/keyagent/keyagent/internal/pattern"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
)

// Options configure [New].
type Options struct {
	Address   string                                     // https://HOST:PORT. Required
	Mount     string                                     // of the transit engine; default transit
	Key       string                                     // Required
	Namespace string                                     // default none
	Name      string                                     // of the server in Wrapped.KEK; default host and namespace
	Token     func(context.Context) (*kms.Secret, error) // asked for each call. Required
	RootCAs   *x509.CertPool                             // Required: the system's roots are never used
	Timeout   time.Duration                              // of one call with its retries; default 10s
	Attempts  int                                        // of one call; default 4
}

const (
	scheme          = "vault-transit"
	domain          = "keyagent vault transit v1"
	defaultMount    = "transit"
	defaultTimeout  = 10 * time.Second
	defaultAttempts = 4
	// firstPause is doubled for each further attempt, and shortened at random.
	firstPause = 100 * time.Millisecond
	// maxReply bounds what a server may answer in bytes.
	maxReply = 64 << 10
)

// KMS wraps keys by a transit engine.
type KMS struct {
	opts   Options
	client *http.Client
	kek    string // without its version
	closed atomic.Bool
}

var (
	_ kms.KMS   = (*KMS)(nil)
	_ kms.Namer = (*KMS)(nil)
)

var (
	pathPattern = pattern.New(`^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$`)
	// ciphertextPattern is what transit gives: a version and base64.
	ciphertextPattern = pattern.New(`^vault:(v[1-9][0-9]{0,8}):[A-Za-z0-9+/]+={0,2}$`)
)

// New returns a KMS. It asks the server nothing yet.
func New(opts Options) (*KMS, error) {
	if opts.Mount == "" {
		opts.Mount = defaultMount
	}
	if opts.Timeout == 0 {
		opts.Timeout = defaultTimeout
	}
	if opts.Attempts == 0 {
		opts.Attempts = defaultAttempts
	}
	u, err := url.Parse(opts.Address)
	switch {
	case err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || strings.Trim(u.Path, "/") != "":
		return nil, errors.New("vault address must be https://HOST:PORT")
	case !pathPattern.MatchString(opts.Mount) || !pathPattern.MatchString(opts.Key) || strings.Contains(opts.Key, "/"):
		return nil, errors.New("vault mount and key must be names")
	case opts.Token == nil:
		return nil, errors.New("vault token is not set")
	case opts.RootCAs == nil:
		return nil, errors.New("vault certificate authority is not set")
	}
	opts.Address = u.Scheme + "://" + u.Host
	if opts.Name == "" {
		opts.Name = strings.Trim(u.Host+"/"+opts.Namespace, "/")
	}
	return &KMS{
		opts: opts,
		kek:  "vault:" + opts.Name + "/" + opts.Mount + "/" + opts.Key,
		client: &http.Client{
			Transport: &http.Transport{
				Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: opts.RootCAs},
				MaxResponseHeaderBytes: 16 << 10, IdleConnTimeout: 30 * time.Second, // its buffers may hold a key
			},
			// A redirect could send the token elsewhere.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Close gives idle connections back. Later calls fail.
func (k *KMS) Close() error {
	k.closed.Store(true)
	k.client.CloseIdleConnections()
	return nil
}

// Generate implements kms.KMS.
func (k *KMS) Generate(ctx context.Context, b kms.Binding) (*kms.Secret, kms.Wrapped, error) {
	return backend.Generate(ctx, b, k.Wrap)
}

// Wrap implements kms.KMS.
func (k *KMS) Wrap(ctx context.Context, b kms.Binding, key *kms.Secret) (kms.Wrapped, error) {
	if err := backend.CheckWrap(ctx, b, key); err != nil {
		return kms.Wrapped{}, err
	}
	var reply struct{ Data struct{ Ciphertext string } }
	err := key.Use(func(p []byte) error {
		// Written by hand, so that the key is in one buffer that is wiped.
		body := []byte(`{"associated_data":"` + base64.StdEncoding.EncodeToString(b.Encode(domain)) + `","plaintext":"`)
		body = base64.StdEncoding.AppendEncode(append(make([]byte, 0, len(body)+128), body...), p)
		body = append(body, `"}`...)
		defer secret.Wipe(body)
		return k.call(ctx, http.MethodPost, "encrypt", body, func(data []byte) error { return json.Unmarshal(data, &reply) })
	})
	if err != nil {
		return kms.Wrapped{}, err
	}
	version := ciphertextPattern.FindStringSubmatch(reply.Data.Ciphertext)
	if version == nil {
		return kms.Wrapped{}, fmt.Errorf("%w: vault answered without a ciphertext", kms.ErrUnavailable)
	}
	return kms.Wrapped{Scheme: scheme, KEK: k.kek + ":" + version[1], Blob: []byte(reply.Data.Ciphertext)}, nil
}

// Unwrap implements kms.KMS.
func (k *KMS) Unwrap(ctx context.Context, b kms.Binding, w kms.Wrapped) (*kms.Secret, error) {
	if err := backend.CheckUnwrap(ctx, b, w, scheme); err != nil {
		return nil, err
	}
	version := ciphertextPattern.FindSubmatch(w.Blob)
	switch {
	case version == nil:
		return nil, fmt.Errorf("%w: not a transit ciphertext", kms.ErrWrongKey)
	case w.KEK != k.kek+":"+string(version[1]):
		return nil, fmt.Errorf("%w: it was created under %q, and its blob under version %s; here is %q", kms.ErrKEKVersion, w.KEK, version[1], k.kek)
	}
	body, err := json.Marshal(map[string]string{
		"ciphertext": string(w.Blob), "associated_data": base64.StdEncoding.EncodeToString(b.Encode(domain)),
	})
	if err != nil {
		return nil, err
	}
	var key *secret.Bytes
	err = k.call(ctx, http.MethodPost, "decrypt", body, func(data []byte) (err error) {
		key, err = plaintext(data, b.Length)
		return err
	})
	return key, err
}

// plaintext takes the key out of an answer. The decoder's buffers are erased
// with the call.
func plaintext(data []byte, length int) (key *secret.Bytes, err error) {
	secret.Do(func() {
		var reply struct {
			Data struct {
				Plaintext json.RawMessage `json:"plaintext"`
			} `json:"data"`
		}
		if err = json.Unmarshal(data, &reply); err != nil {
			err = fmt.Errorf("%w: vault's answer is not JSON", kms.ErrUnavailable)
			return
		}
		raw := []byte(reply.Data.Plaintext)
		defer secret.Wipe(raw)
		decoded := make([]byte, base64.StdEncoding.DecodedLen(len(raw)))
		defer secret.Wipe(decoded)
		n, decodeErr := base64.StdEncoding.Strict().Decode(decoded, bytes.Trim(raw, `"`))
		if decodeErr != nil || n != length {
			err = fmt.Errorf("%w: vault gave a key of another length", kms.ErrWrongKey)
			return
		}
		key, err = secret.From(decoded[:n])
	})
	return key, err
}

// Current implements kms.Namer. The token needs the capability read on
// MOUNT/keys/KEY.
func (k *KMS) Current(ctx context.Context) (string, error) {
	var reply struct {
		Data struct {
			LatestVersion uint32 `json:"latest_version"`
		}
	}
	err := k.call(ctx, http.MethodGet, "keys", nil, func(data []byte) error { return json.Unmarshal(data, &reply) })
	if err == nil && reply.Data.LatestVersion == 0 {
		err = fmt.Errorf("%w: vault answered without a version", kms.ErrUnavailable)
	}
	return fmt.Sprintf("%s:v%d", k.kek, reply.Data.LatestVersion), err
}

// call sends one request, again if it makes sense, and hands the answer to use,
// whose buffer is wiped afterwards.
func (k *KMS) call(ctx context.Context, method, verb string, body []byte, use func([]byte) error) error {
	ctx, cancel := context.WithTimeout(ctx, k.opts.Timeout)
	defer cancel()
	for pause, attempt := firstPause, 1; ; pause, attempt = 2*pause, attempt+1 {
		err := k.try(ctx, method, verb, body, use)
		if !errors.Is(err, kms.ErrUnavailable) || ctx.Err() != nil || attempt >= k.opts.Attempts {
			return err
		}
		select {
		case <-time.After(pause/2 + rand.N(pause/2)):
		case <-ctx.Done():
			return err
		}
	}
}

func (k *KMS) try(ctx context.Context, method, verb string, body []byte, use func([]byte) error) error {
	if k.closed.Load() {
		return errClosed
	}
	token, err := k.opts.Token(ctx)
	if err != nil {
		return fmt.Errorf("%w: vault token: %w", kms.ErrCredentials, err)
	}
	defer token.Close()
	req, err := http.NewRequestWithContext(ctx, method, k.opts.Address+"/v1/"+k.opts.Mount+"/"+verb+"/"+k.opts.Key, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Vault-Request", "true")
	if k.opts.Namespace != "" {
		req.Header.Set("X-Vault-Namespace", k.opts.Namespace)
	}
	if err := token.Use(func(t []byte) error { req.Header.Set("X-Vault-Token", string(bytes.TrimSpace(t))); return nil }); err != nil {
		return err
	}
	resp, err := k.client.Do(req)
	if err != nil {
		return fmt.Errorf("%w: vault: %w", kms.ErrUnavailable, err)
	}
	defer resp.Body.Close()
	// Of its full size at once: one that grows leaves copies behind.
	buffer := make([]byte, maxReply+1)
	defer secret.Wipe(buffer)
	n, err := io.ReadFull(resp.Body, buffer)
	data := buffer[:n]
	switch {
	case err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: vault: %w", kms.ErrUnavailable, err)
	case n > maxReply:
		return fmt.Errorf("%w: vault's answer has more than %d bytes", kms.ErrUnavailable, maxReply)
	case resp.StatusCode != http.StatusOK:
		return k.refusal(verb, resp.StatusCode, data)
	}
	return use(data)
}

var errClosed = fmt.Errorf("vault: %w", kms.ErrClosed)

// refusal classes an answer by its status, as the HTTP API documents them. The
// server's own words say which of its rules it was.
func (k *KMS) refusal(verb string, status int, data []byte) error {
	var reply struct{ Errors []string }
	_ = json.Unmarshal(data, &reply)
	why := strings.Join(reply.Errors, "; ")
	why = why[:min(len(why), 256)]
	class := kms.ErrUnavailable
	switch {
	case status == http.StatusForbidden && strings.Contains(why, "invalid token"):
		class = kms.ErrCredentials
	case status == http.StatusForbidden:
		capability := "update"
		if verb == "keys" {
			capability = "read"
		}
		return fmt.Errorf("%w: vault: capability %q on path %q: %s", kms.ErrDenied, capability, k.opts.Mount+"/"+verb+"/"+k.opts.Key, why)
	case status == http.StatusNotFound, status == http.StatusBadRequest && verb == "encrypt",
		status == http.StatusBadRequest && (strings.Contains(why, "encryption key not found") || strings.Contains(why, "disallowed by policy")):
		class = kms.ErrKEK
	case status == http.StatusBadRequest && verb == "decrypt":
		class = kms.ErrWrongKey
	case status == http.StatusTooManyRequests:
		class = kms.ErrThrottled
	}
	return fmt.Errorf("%w: vault answered %d: %s", class, status, why)
}
