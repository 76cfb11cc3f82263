package setup

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/kms/command"
)

// MasterSecretFile returns the file that a kms://cluster-kms?file=PATH URI
// names.
func MasterSecretFile(uri string) (string, error) {
	u, err := parse(uri, "kms")
	if err != nil {
		return "", err
	}
	if u.Name != "cluster-kms" {
		return "", fmt.Errorf("%w: only kms://cluster-kms has a master secret", kms.ErrURI)
	}
	return u.Required("file")
}

func clusterKMS(u *kms.URI) (*cluster.KMS, error) {
	sources := map[string]string{}
	for _, name := range []string{"file", "credential", "key", "constellationFile"} {
		if v := u.Optional(name); v != "" {
			sources[name] = v
		}
	}
	saltText, saltFile, derivation := u.Optional("salt"), u.Optional("saltFile"), u.Optional("derivation")
	if err := u.Done(); err != nil {
		return nil, err
	}
	switch {
	case len(sources) != 1:
		return nil, fmt.Errorf("%w: kms://cluster-kms needs one of the parameters \"file\", \"credential\", \"constellationFile\" and \"key\"", kms.ErrURI)
	case derivation != "" && derivation != "constellation":
		return nil, fmt.Errorf("%w: the parameter \"derivation\" is constellation, or left out", kms.ErrURI)
	case saltText != "" && saltFile != "", sources["constellationFile"] != "" && saltText+saltFile != "":
		return nil, fmt.Errorf("%w: kms://cluster-kms takes its salt from one place", kms.ErrURI)
	}
	opts := cluster.Options{Constellation: derivation != ""}
	var err error
	if saltText != "" {
		if opts.Salt, err = unbase64([]byte(saltText)); err != nil {
			return nil, fmt.Errorf("%w: the parameter \"salt\" is base64", kms.ErrURI)
		}
	}
	if saltFile != "" {
		if opts.Salt, err = config.ReadPublicFile(saltFile, cluster.MaxMasterSecret); err != nil {
			return nil, fmt.Errorf("salt: %w", err)
		}
	}
	switch {
	case sources["file"] != "":
		opts.MasterSecret, err = cluster.LoadMasterSecret(sources["file"])
	case sources["credential"] != "":
		opts.MasterSecret, err = cluster.LoadCredential(sources["credential"])
	case sources["key"] != "":
		opts.MasterSecret, err = masterFromText(sources["key"])
	default:
		opts.MasterSecret, opts.Salt, err = masterOfConstellation(sources["constellationFile"])
	}
	if err != nil {
		return nil, err
	}
	defer opts.MasterSecret.Close()
	return cluster.New(opts)
}

func masterFromText(text string) (*secret.Bytes, error) {
	raw, err := unbase64([]byte(text))
	if err != nil || len(raw) == 0 {
		return nil, fmt.Errorf("%w: the parameter \"key\" is base64", kms.ErrURI)
	}
	return secret.From(raw)
}

// unbase64 reads both alphabets, with padding or without.
func unbase64(text []byte) ([]byte, error) {
	text = bytes.Map(func(r rune) rune {
		switch r {
		case '-':
			return '+'
		case '_':
			return '/'
		}
		return r
	}, bytes.TrimRight(text, "="))
	defer secret.Wipe(text)
	out := make([]byte, base64.RawStdEncoding.DecodedLen(len(text)))
	n, err := base64.RawStdEncoding.Strict().Decode(out, text)
	return out[:n], err
}

// masterOfConstellation reads the file constellation-mastersecret.json: a JSON
// object with the fields key and salt, both in base64.
func masterOfConstellation(path string) (master *secret.Bytes, salt []byte, err error) {
	text, err := config.ReadSecretFile(path, 4<<10)
	if err != nil {
		return nil, nil, fmt.Errorf("master secret: %w", err)
	}
	defer text.Close()
	err = text.Use(func(b []byte) error {
		secret.Do(func() {
			var m struct {
				Key  []byte `json:"key"`
				Salt []byte `json:"salt"`
			}
			defer func() { secret.Wipe(m.Key) }()
			d := json.NewDecoder(bytes.NewReader(b))
			d.DisallowUnknownFields()
			if err = d.Decode(&m); err != nil || d.More() || len(m.Key) == 0 {
				err = errors.New("master secret: the file is not a JSON object with the fields key and salt in base64")
				return // the decoder's own error can repeat what it read
			}
			salt = m.Salt
			master, err = secret.From(m.Key)
		})
		return err
	})
	return master, salt, err
}

func commandKMS(ctx context.Context, u *kms.URI) (*command.KMS, error) {
	text, err := u.Required("command")
	if err != nil {
		return nil, err
	}
	opts := command.Options{Command: text, Encoding: command.Encoding(u.Optional("encoding")), Log: slog.Default()}
	if opts.Deadline, err = duration(u, "deadline"); err != nil {
		return nil, err
	}
	if opts.Cache, err = duration(u, "cache"); err != nil {
		return nil, err
	}
	if err := u.Done(); err != nil {
		return nil, err
	}
	return command.New(ctx, opts)
}
