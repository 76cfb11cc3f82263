package setup

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/cluster"
)

// A master secret may lie wrapped by another KMS, which is asked for it at each start:
// kms://cluster-kms?wrappedFile=PATH&wrappedBy=URI. docs/spec/keys.md specifies the file.

// wrappedMaster is the file.
type wrappedMaster struct {
	Version int         `json:"version"` // 1
	Length  int         `json:"length"`  // of the master secret in bytes
	Wrapped kms.Wrapped `json:"wrapped"`
}

const (
	wrappedVersion = 1
	maxWrapped     = 64 << 10 // bytes of a file
)

// ErrWrapped means that a file is not a wrapped master secret.
var ErrWrapped = errors.New("not a wrapped master secret")

func masterBinding(length int) kms.Binding {
	return kms.Binding{VolumeID: "keyservice", Purpose: kms.MasterSecret, Version: 1, Length: length}
}

// parseWrapped reads such a file strictly. Its errors wrap [ErrWrapped].
func parseWrapped(data []byte) (w wrappedMaster, err error) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	err = d.Decode(&w)
	if _, end := d.Token(); err == nil && !errors.Is(end, io.EOF) {
		err = errors.New("something comes after it")
	}
	if err == nil && w.Version != wrappedVersion {
		err = fmt.Errorf("version %d is not known here", w.Version)
	}
	if err == nil {
		err = masterBinding(w.Length).Validate()
	}
	if err != nil {
		return wrappedMaster{}, fmt.Errorf("%w: %w", ErrWrapped, err)
	}
	return w, nil
}

// wrapper opens the KMS that wraps master secrets.
func wrapper(ctx context.Context, uri string) (Keys, error) {
	u, err := parse(uri, "kms")
	if err != nil {
		return nil, fmt.Errorf("wrappedBy: %w", err)
	}
	if u.Name == "cluster-kms" {
		return nil, fmt.Errorf("%w: wrappedBy names another KMS than this: its own master secret would have to lie somewhere", kms.ErrURI)
	}
	k, err := KMS(ctx, uri)
	if err != nil {
		return nil, fmt.Errorf("wrappedBy: %w", err)
	}
	return k, nil
}

// unwrapMaster reads the master secret of a file.
func unwrapMaster(ctx context.Context, path, by string) (*secret.Bytes, error) {
	data, err := config.ReadPublicFile(path, maxWrapped)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w (hint: keyagent serve --init-master-secret makes one, once; keyagent kms wrap-secret wraps one that there is)", err)
	}
	if err != nil {
		return nil, fmt.Errorf("wrapped master secret: %w", err)
	}
	w, err := parseWrapped(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	k, err := wrapper(ctx, by)
	if err != nil {
		return nil, err
	}
	defer k.Close()
	master, err := k.Unwrap(ctx, masterBinding(w.Length), w.Wrapped)
	if err != nil {
		return nil, fmt.Errorf("unwrap the master secret: %w", err)
	}
	return master, nil
}

// WrapMaster has the KMS that by names wrap a master secret, checks that it comes back, and
// writes it to path, where nothing may be: [fs.ErrExist].
func WrapMaster(ctx context.Context, master *kms.Secret, path, by string) error {
	k, err := wrapper(ctx, by)
	if err != nil {
		return err
	}
	defer k.Close()
	b := masterBinding(master.Len())
	if err := b.Validate(); err != nil {
		return fmt.Errorf("a master secret that is wrapped: %w", err)
	}
	w, err := k.Wrap(ctx, b, master)
	if err != nil {
		return fmt.Errorf("wrap the master secret: %w", err)
	}
	back, err := k.Unwrap(ctx, b, w)
	if err != nil {
		return fmt.Errorf("what was wrapped does not come back: %w", err)
	}
	defer back.Close()
	if !back.Equal(master) {
		return fmt.Errorf("%w: another one comes back than was wrapped", kms.ErrWrongKey)
	}
	data, err := json.MarshalIndent(wrappedMaster{wrappedVersion, master.Len(), w}, "", "  ")
	if err != nil {
		return err
	}
	text, err := secret.From(append(data, '\n')) // it is none; the file appears whole, or not
	if err != nil {
		return err
	}
	defer text.Close()
	return config.WriteSecretFile(path, text)
}

// InitMaster makes the master secret that a kms://cluster-kms URI names by file, or wrapped, if
// there is none.
func InitMaster(ctx context.Context, uri string) error {
	u, err := parse(uri, "kms")
	if err != nil {
		return err
	}
	path, by := u.Optional("wrappedFile"), u.Optional("wrappedBy")
	switch {
	case u.Name != "cluster-kms":
		return fmt.Errorf("%w: only kms://cluster-kms has a master secret", kms.ErrURI)
	case path == "":
		if path, err = u.Required("file"); err != nil {
			return err
		}
		return ignoreExisting(cluster.InitMasterSecret(path))
	}
	if _, err := os.Lstat(path); err == nil {
		return nil
	}
	master, err := secret.Random(cluster.NewMasterSecret)
	if err != nil {
		return err
	}
	defer master.Close()
	return ignoreExisting(WrapMaster(ctx, master, path, by))
}

func ignoreExisting(err error) error {
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}
