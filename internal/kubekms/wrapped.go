package kubekms

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/kms"
)

const (
	// wrappedVersion is of the file's format.
	wrappedVersion = 1
	// maxWrappedKeys bounds the file; its reader unwraps all of them.
	maxWrappedKeys = 16
	maxWrappedFile = 1 << 20
	kekLength      = 32
	kekVolume      = "kubekms"
)

// WrappedFile is a file of local KEKs, each wrapped by a key management service:
// what survives a restart, and never in plain. The one with the highest version
// encrypts.
type WrappedFile struct {
	Path string
	KMS  kms.KMS
	// Classify gives an error of the KMS its class.
	Classify func(error) error
}

type wrappedKeys struct {
	Version int          `json:"version"`
	Keys    []wrappedKEK `json:"keys"`
}

type wrappedKEK struct {
	Version uint32      `json:"version"`
	Created time.Time   `json:"created"`
	Wrapped kms.Wrapped `json:"wrapped"`
}

func binding(version uint32) kms.Binding {
	return kms.Binding{VolumeID: kekVolume, Purpose: kms.KubernetesKEK, Version: version, Length: kekLength}
}

// Fetch implements Source: it reads the file and unwraps every key in it.
func (w *WrappedFile) Fetch(ctx context.Context) (*Keys, error) {
	file, err := w.read()
	if err != nil {
		return nil, err
	}
	out := &Keys{}
	for i := len(file.Keys) - 1; i >= 0; i-- {
		k := file.Keys[i]
		s, err := w.KMS.Unwrap(ctx, binding(k.Version), k.Wrapped)
		if err != nil {
			err = w.Classify(fmt.Errorf("%s: key %d: %w", w.Path, k.Version, err))
			return nil, errors.Join(err, out.Close())
		}
		if out.Current == nil {
			out.Current = s
		} else {
			out.Old = append(out.Old, s)
		}
	}
	return out, nil
}

// Init makes the file with a first KEK. A file that exists is left alone, and is
// [fs.ErrExist].
func (w *WrappedFile) Init(ctx context.Context) error {
	if _, err := os.Lstat(w.Path); err == nil {
		return fmt.Errorf("%s: %w", w.Path, fs.ErrExist)
	}
	return w.locked(func() error { return w.add(ctx, &wrappedKeys{Version: wrappedVersion}, true) })
}

// Rotate adds a new KEK, which every plugin that reads the file encrypts with after
// the observations it needs. It returns the KEK's version.
func (w *WrappedFile) Rotate(ctx context.Context) (version uint32, err error) {
	err = w.locked(func() error {
		file, err := w.read()
		if err != nil {
			return err
		}
		if len(file.Keys) == maxWrappedKeys {
			return failure.Newf(failure.State, "rewrite the objects of the oldest KEK, then forget it", "%s: it holds %d KEKs, which is the most", w.Path, maxWrappedKeys)
		}
		err = w.add(ctx, file, false)
		version = file.Keys[len(file.Keys)-1].Version
		return err
	})
	return version, err
}

// Forget takes the KEKs before a version out of the file: what is still encrypted
// under them cannot be read any more. The last one stays.
func (w *WrappedFile) Forget(before uint32) (forgotten int, err error) {
	err = w.locked(func() error {
		file, err := w.read()
		if err != nil {
			return err
		}
		last := file.Keys[len(file.Keys)-1].Version
		if before > last {
			return failure.Newf(failure.Usage, "", "%s: the KEK that encrypts has version %d", w.Path, last)
		}
		for len(file.Keys) > 0 && file.Keys[0].Version < before {
			file.Keys = file.Keys[1:]
			forgotten++
		}
		return w.write(file, false)
	})
	return forgotten, err
}

func (w *WrappedFile) add(ctx context.Context, file *wrappedKeys, exclusive bool) error {
	version := uint32(1)
	if n := len(file.Keys); n > 0 {
		version = file.Keys[n-1].Version + 1
	}
	key, wrapped, err := w.KMS.Generate(ctx, binding(version))
	if err != nil {
		return w.Classify(fmt.Errorf("new KEK: %w", err))
	}
	file.Keys = append(file.Keys, wrappedKEK{version, time.Now().UTC().Truncate(time.Second), wrapped})
	return errors.Join(key.Close(), w.write(file, exclusive))
}

func (w *WrappedFile) read() (*wrappedKeys, error) {
	data, err := config.ReadPublicFile(w.Path, maxWrappedFile)
	if err != nil {
		class, hint := failure.Configuration, ""
		if errors.Is(err, fs.ErrNotExist) {
			class, hint = failure.NotFound, "--init makes it, the first time"
		}
		return nil, failure.New(class, fmt.Errorf("wrapped KEKs: %w", err), hint)
	}
	file, err := parseWrapped(data)
	if err != nil {
		return nil, failure.New(failure.Tampered, fmt.Errorf("%s: %w", w.Path, err), "put a copy of it back")
	}
	return file, nil
}

func parseWrapped(data []byte) (*wrappedKeys, error) {
	var file wrappedKeys
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&file); err != nil {
		return nil, fmt.Errorf("wrapped KEKs: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("wrapped KEKs: something follows them")
	}
	switch {
	case file.Version != wrappedVersion:
		return nil, fmt.Errorf("wrapped KEKs: unknown version %d", file.Version)
	case len(file.Keys) == 0 || len(file.Keys) > maxWrappedKeys:
		return nil, fmt.Errorf("wrapped KEKs: there are %d, allowed are 1 to %d", len(file.Keys), maxWrappedKeys)
	}
	for i, k := range file.Keys {
		if k.Version == 0 || i > 0 && k.Version <= file.Keys[i-1].Version {
			return nil, errors.New("wrapped KEKs: their versions do not rise")
		}
	}
	return &file, nil
}

// write replaces the file as a whole; exclusive makes a new one.
func (w *WrappedFile) write(file *wrappedKeys, exclusive bool) error {
	data, err := json.MarshalIndent(file, "", "  ")
	if err != nil {
		return err
	}
	if !exclusive {
		return failure.New(failure.Configuration, config.ReplaceFile(w.Path, append(data, '\n')), "")
	}
	dir := filepath.Dir(w.Path)
	f, err := os.CreateTemp(dir, ".wrapped-kek-*")
	if err != nil {
		return failure.New(failure.Configuration, err, "")
	}
	defer os.Remove(f.Name())
	_, err = f.Write(append(data, '\n'))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), w.Path); err != nil { // unlike a rename, it fails where a file is
		return failure.New(failure.Configuration, err, "")
	}
	return config.SyncDir(dir)
}

// locked keeps two changes of a file apart by a lock on its folder.
func (w *WrappedFile) locked(f func() error) error {
	d, err := os.Open(filepath.Dir(w.Path))
	if err != nil {
		return failure.New(failure.Configuration, err, "")
	}
	defer d.Close()
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	return f()
}
