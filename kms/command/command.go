// Package command is a KMS whose KEK an arbitrary command prints: whatever key
// management somebody has, as one unix command.
//
// The command is run by /bin/sh. Its standard output is the KEK: exactly 16, 24
// or 32 bytes, raw or encoded, read straight into locked memory. Its standard
// error goes to the log. It has a deadline, after which it and everything that it
// started is killed. DEKs are random and wrapped under the KEK by AES-GCM, see
// docs/spec/keys.md.
package command

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/shell"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/backend"
)

// Encoding is how the command prints the KEK.
type Encoding string

// The encodings.
const (
	Raw    Encoding = "raw"
	Base64 Encoding = "base64"
	Hex    Encoding = "hex"
)

// The defaults of [Options].
const (
	DefaultDeadline = 30 * time.Second
	DefaultCache    = time.Hour
)

// maxOutput bounds what a command may print; the longest KEK in hex is 64 bytes.
const maxOutput = 256

// ErrCommand means that the command failed, took too long, or printed no KEK.
var ErrCommand = fmt.Errorf("%w: key command", kms.ErrUnavailable)

// Options configure [New].
type Options struct {
	Command  string        // for /bin/sh -c. Required
	Encoding Encoding      // default Raw
	Deadline time.Duration // of one run; default DefaultDeadline
	Cache    time.Duration // how long a KEK is kept; default DefaultCache
	Log      *slog.Logger  // default none
	Now      func() time.Time
}

// Source runs the command.
type Source struct {
	opts Options
}

// NewSource checks the options. It runs nothing.
func NewSource(opts Options) (*Source, error) {
	switch {
	case opts.Command == "":
		return nil, errors.New("key command is not set")
	case opts.Encoding == "":
		opts.Encoding = Raw
	case opts.Encoding != Raw && opts.Encoding != Base64 && opts.Encoding != Hex:
		return nil, fmt.Errorf("unknown encoding %q of the key command (hint: raw, base64 or hex)", opts.Encoding)
	}
	if opts.Deadline == 0 {
		opts.Deadline = DefaultDeadline
	}
	if opts.Cache == 0 {
		opts.Cache = DefaultCache
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	return &Source{opts}, nil
}

// Fetch runs the command once and returns what it printed. The error wraps
// [ErrCommand].
func (s *Source) Fetch(ctx context.Context) (*kms.Secret, error) {
	var out *secret.Bytes
	err := shell.Run(ctx, shell.Command{
		Name: "key command", Text: s.opts.Command, Deadline: s.opts.Deadline, Log: s.opts.Log,
		Stdout: func(r io.Reader) (err error) {
			out, err = secret.Read(r, maxOutput)
			if errors.Is(err, secret.ErrEmpty) {
				return nil // it may have failed, which says more
			}
			return err
		},
	})
	if out != nil {
		defer out.Close()
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrCommand, err)
	case out == nil:
		return nil, fmt.Errorf("%w: %w", ErrCommand, errLength)
	}
	kek, err := s.decode(out)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCommand, err)
	}
	return kek, nil
}

var errLength = errors.New("it printed no key of 16, 24 or 32 bytes")

func validLength(n int) bool { return n == 16 || n == 24 || n == 32 }

// decode gives the KEK. One newline at the end is forgiven where it cannot be
// part of the key: behind an encoded key, and behind a raw one whose length is
// right without it.
func (s *Source) decode(out *secret.Bytes) (kek *secret.Bytes, err error) {
	err = out.Use(func(p []byte) error {
		text, newline := bytes.CutSuffix(p, []byte("\n"))
		if s.opts.Encoding == Raw {
			if validLength(len(p)) {
				text, newline = p, false
			}
			if !validLength(len(text)) {
				return fmt.Errorf("%w, but %d bytes", errLength, len(p))
			}
			if newline {
				s.opts.Log.Info("the key command's output ends with a newline, which is not taken as part of the key")
			}
			kek, err = secret.New(len(text))
			if err != nil {
				return err
			}
			return kek.Use(func(k []byte) error { copy(k, text); return nil })
		}
		decoded := make([]byte, maxOutput)
		defer secret.Wipe(decoded)
		var n int
		if s.opts.Encoding == Hex {
			n, err = hex.Decode(decoded, text)
		} else {
			n, err = base64.StdEncoding.Strict().Decode(decoded, text)
		}
		if err != nil {
			return fmt.Errorf("it printed no key in %s", s.opts.Encoding) // the decoder's error names bytes of it
		}
		if !validLength(n) {
			return fmt.Errorf("%w, but %d bytes", errLength, n)
		}
		kek, err = secret.New(n)
		if err != nil {
			return err
		}
		return kek.Use(func(k []byte) error { copy(k, decoded[:n]); return nil })
	})
	return kek, err
}

const (
	schemeWrapped = "command-aes-gcm"
	domainID      = "keyagent command KEK id v1"
)

// foreignFor is how long a KEK that the command does not print is not asked for
// again.
const foreignFor = time.Minute

// KMS wraps keys under the KEK that the command prints.
type KMS struct {
	source *Source
	turn   chan struct{} // of who runs the command

	mu      sync.RWMutex // never held while the command runs
	kek     *secret.Bytes
	id      string
	fetched time.Time
	foreign map[string]time.Time // names of other KEKs, and when they were looked for
}

var (
	_ kms.KMS   = (*KMS)(nil)
	_ kms.Namer = (*KMS)(nil)
)

// New runs the command, which must succeed.
func New(ctx context.Context, opts Options) (*KMS, error) {
	s, err := NewSource(opts)
	if err != nil {
		return nil, err
	}
	k := &KMS{source: s, turn: make(chan struct{}, 1), foreign: map[string]time.Time{}}
	if err := k.refresh(ctx); err != nil {
		return nil, err
	}
	return k, nil
}

// Close wipes the KEK.
func (k *KMS) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.kek.Close()
}

// refresh runs the command.
func (k *KMS) refresh(ctx context.Context) error {
	kek, err := k.source.Fetch(ctx)
	if err != nil {
		return err
	}
	var id string
	err = kek.Use(func(b []byte) error {
		sum, err := hkdf.Key(sha256.New, b, nil, domainID, 8)
		id = "command:" + hex.EncodeToString(sum)
		return err
	})
	if err != nil {
		return errors.Join(err, kek.Close())
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.foreign, id)
	former := k.kek
	k.kek, k.id, k.fetched = kek, id, k.source.opts.Now()
	return former.Close()
}

// errStale: the KEK in memory is not the one to use; the command must be run.
var errStale = errors.New("key command must be run")

// use calls f with the KEK. One that is too old is fetched again first, and so
// is one that is not the KEK that want names: it may have been changed. A KEK
// whose refresh fails is not used any longer.
func (k *KMS) use(ctx context.Context, want string, f func(kek *secret.Bytes, id string) error) error {
	err := k.useCached(ctx, want, f)
	if !errors.Is(err, errStale) {
		return err
	}
	select {
	case k.turn <- struct{}{}:
		defer func() { <-k.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	// Anyone who had the turn before may have fetched what is wanted here.
	if err := k.useCached(ctx, want, f); !errors.Is(err, errStale) {
		return err
	}
	fresh := k.fresh()
	if err := k.refresh(ctx); err != nil {
		if fresh && ctx.Err() == nil {
			// The KEK here is good; it is another one that is wanted, and
			// somebody else may have it.
			return fmt.Errorf("%w: it was created under %q: %w", kms.ErrKEKVersion, want, err)
		}
		return err
	}
	err = k.useCached(ctx, want, f)
	if errors.Is(err, errStale) {
		k.mu.Lock()
		defer k.mu.Unlock()
		if len(k.foreign) > 1000 { // anybody who writes storage can name one
			clear(k.foreign)
		}
		k.foreign[want] = k.source.opts.Now()
		return k.foreignErr(want)
	}
	return err
}

// useCached calls f with the KEK in memory, or returns errStale.
func (k *KMS) useCached(ctx context.Context, want string, f func(kek *secret.Bytes, id string) error) error {
	k.mu.RLock()
	defer k.mu.RUnlock()
	now := k.source.opts.Now()
	switch looked, known := k.foreign[want]; {
	case ctx.Err() != nil:
		return ctx.Err()
	case now.Sub(k.fetched) >= k.source.opts.Cache:
		return errStale
	case want == "" || want == k.id:
		return f(k.kek, k.id)
	case known && now.Sub(looked) < foreignFor:
		return k.foreignErr(want)
	}
	return errStale
}

func (k *KMS) foreignErr(want string) error {
	return fmt.Errorf("%w: it was created under %q, the command prints %q", kms.ErrKEKVersion, want, k.id)
}

func (k *KMS) fresh() bool {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return k.source.opts.Now().Sub(k.fetched) < k.source.opts.Cache
}

// Current implements kms.Namer.
func (k *KMS) Current(ctx context.Context) (name string, err error) {
	err = k.use(ctx, "", func(_ *secret.Bytes, id string) error { name = id; return nil })
	return name, err
}

// Generate implements kms.KMS.
func (k *KMS) Generate(ctx context.Context, b kms.Binding) (*kms.Secret, kms.Wrapped, error) {
	return backend.Generate(ctx, b, k.Wrap)
}

// Wrap implements kms.KMS.
func (k *KMS) Wrap(ctx context.Context, b kms.Binding, key *kms.Secret) (kms.Wrapped, error) {
	if err := b.Validate(); err != nil {
		return kms.Wrapped{}, err
	}
	w := kms.Wrapped{Scheme: schemeWrapped}
	err := k.use(ctx, "", func(kek *secret.Bytes, id string) (err error) {
		w.KEK = id
		w.Blob, err = backend.Seal(kek, b, key)
		return err
	})
	return w, err
}

// Unwrap implements kms.KMS.
func (k *KMS) Unwrap(ctx context.Context, b kms.Binding, w kms.Wrapped) (*kms.Secret, error) {
	if err := backend.CheckUnwrap(ctx, b, w, schemeWrapped); err != nil {
		return nil, err
	}
	var key *secret.Bytes
	err := k.use(ctx, w.KEK, func(kek *secret.Bytes, _ string) (err error) {
		key, err = backend.Open(kek, b, w.Blob)
		return err
	})
	return key, err
}
