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
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
)

// Options configure [New].
type Options struct {
	Address   string                                       // https://HOST:PORT. Required
	Mount     string                                       // of the transit engine; default transit
	Key       string                                       // Required
	Namespace string                                       // default none
	Token     func(context.Context) (*secret.Bytes, error) // asked for each call. Required
	RootCAs   *x509.CertPool                               // Required: the system's roots are never used
	Timeout   time.Duration                                // of one call; default 10s
}

const (
	scheme         = "vault-transit"
	domain         = "keyagent vault transit v1"
	defaultMount   = "transit"
	defaultTimeout = 10 * time.Second
	// maxReply bounds what a server may answer in bytes.
	maxReply = 64 << 10
)

// KMS wraps keys by a transit engine.
type KMS struct {
	opts   Options
	client *http.Client
	kek    string
}

var _ kms.KMS = (*KMS)(nil)

var (
	pathPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$`)
	// ciphertextPattern is what transit gives: a version and base64.
	ciphertextPattern = regexp.MustCompile(`^vault:v[1-9][0-9]{0,8}:[A-Za-z0-9+/]+={0,2}$`)
)

// New returns a KMS. It asks the server nothing yet.
func New(opts Options) (*KMS, error) {
	if opts.Mount == "" {
		opts.Mount = defaultMount
	}
	if opts.Timeout == 0 {
		opts.Timeout = defaultTimeout
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
	return &KMS{
		opts: opts,
		kek:  "vault:" + opts.Mount + "/" + opts.Key,
		client: &http.Client{
			Timeout:   opts.Timeout,
			Transport: &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: opts.RootCAs}, MaxResponseHeaderBytes: 16 << 10},
			// A redirect could send the token elsewhere.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Close gives idle connections back.
func (k *KMS) Close() error {
	k.client.CloseIdleConnections()
	return nil
}

// Generate implements kms.KMS.
func (k *KMS) Generate(ctx context.Context, b kms.Binding) (*secret.Bytes, kms.Wrapped, error) {
	return kms.GenerateWrapped(ctx, b, k.Wrap)
}

// Wrap implements kms.KMS.
func (k *KMS) Wrap(ctx context.Context, b kms.Binding, key *secret.Bytes) (kms.Wrapped, error) {
	if err := errors.Join(ctx.Err(), b.Validate()); err != nil {
		return kms.Wrapped{}, err
	}
	if key.Len() != b.Length {
		return kms.Wrapped{}, fmt.Errorf("%w: the key has %d bytes, the binding says %d", kms.ErrBinding, key.Len(), b.Length)
	}
	var reply struct{ Data struct{ Ciphertext string } }
	err := key.Use(func(p []byte) error {
		// Written by hand, so that the key is in one buffer that is wiped.
		body := []byte(`{"associated_data":"` + base64.StdEncoding.EncodeToString(b.Encode(domain)) + `","plaintext":"`)
		body = base64.StdEncoding.AppendEncode(append(make([]byte, 0, len(body)+128), body...), p)
		body = append(body, `"}`...)
		defer secret.Wipe(body)
		return k.call(ctx, "encrypt", body, func(data []byte) error { return json.Unmarshal(data, &reply) })
	})
	if err != nil {
		return kms.Wrapped{}, err
	}
	if !ciphertextPattern.MatchString(reply.Data.Ciphertext) {
		return kms.Wrapped{}, fmt.Errorf("%w: vault answered without a ciphertext", kms.ErrUnavailable)
	}
	return kms.Wrapped{Scheme: scheme, KEK: k.kek, Blob: []byte(reply.Data.Ciphertext)}, nil
}

// Unwrap implements kms.KMS.
func (k *KMS) Unwrap(ctx context.Context, b kms.Binding, w kms.Wrapped) (*secret.Bytes, error) {
	if err := errors.Join(ctx.Err(), b.Validate()); err != nil {
		return nil, err
	}
	switch {
	case w.Scheme != scheme:
		return nil, fmt.Errorf("%w: unknown scheme", kms.ErrWrongKey)
	case w.KEK != k.kek:
		return nil, fmt.Errorf("%w: it was made under %q, here is %q", kms.ErrKEKVersion, w.KEK, k.kek)
	case len(w.Blob) > 4096 || !ciphertextPattern.Match(w.Blob):
		return nil, fmt.Errorf("%w: not a transit ciphertext", kms.ErrWrongKey)
	}
	body, err := json.Marshal(map[string]string{
		"ciphertext": string(w.Blob), "associated_data": base64.StdEncoding.EncodeToString(b.Encode(domain)),
	})
	if err != nil {
		return nil, err
	}
	var key *secret.Bytes
	err = k.call(ctx, "decrypt", body, func(data []byte) (err error) {
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

// call sends one request and hands the answer to use, whose buffer is wiped
// afterwards.
func (k *KMS) call(ctx context.Context, verb string, body []byte, use func([]byte) error) error {
	token, err := k.opts.Token(ctx)
	if err != nil {
		return fmt.Errorf("vault token: %w", err)
	}
	defer token.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, k.opts.Address+"/v1/"+k.opts.Mount+"/"+verb+"/"+k.opts.Key, bytes.NewReader(body))
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
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	defer secret.Wipe(data)
	switch {
	case err != nil:
		return fmt.Errorf("%w: vault: %w", kms.ErrUnavailable, err)
	case len(data) > maxReply:
		return fmt.Errorf("%w: vault's answer has more than %d bytes", kms.ErrUnavailable, maxReply)
	case resp.StatusCode != http.StatusOK:
		return k.refusal(verb, resp.StatusCode, data)
	}
	return use(data)
}

// refusal classes an answer by its status, as the HTTP API documents them. The
// server's own words say which of its rules it was.
func (k *KMS) refusal(verb string, status int, data []byte) error {
	var reply struct{ Errors []string }
	_ = json.Unmarshal(data, &reply)
	why := strings.Join(reply.Errors, "; ")
	why = why[:min(len(why), 256)]
	switch {
	case status == http.StatusBadRequest && verb == "decrypt":
		return fmt.Errorf("%w: vault: %s", kms.ErrWrongKey, why)
	case status == http.StatusForbidden:
		return fmt.Errorf("%w: vault refuses %s (needs capability \"update\" on path %q): %s", kms.ErrUnavailable, verb, k.opts.Mount+"/"+verb+"/"+k.opts.Key, why)
	}
	return fmt.Errorf("%w: vault answered %d: %s", kms.ErrUnavailable, status, why)
}
