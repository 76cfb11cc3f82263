package setup

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/kms/command"
)

// clusterKMS opens the cluster KMS. given is the master secret of one that is sealed, else nil.
func clusterKMS(ctx context.Context, u *kms.URI, given *kms.Secret) (*cluster.KMS, error) {
	sources := map[string]string{}
	for _, name := range []string{"file", "credential", "key", "keyFile", "keyCredential", "constellationFile", "wrappedFile", "sealedFile"} {
		if v := u.Optional(name); v != "" {
			sources[name] = v
		}
	}
	saltText, saltFile, noSalt := u.Optional("salt"), u.Optional("saltFile"), u.Optional("noSalt")
	wrappedBy := u.Optional("wrappedBy")
	derivation := cluster.Derivation(u.Optional("derivation"))
	known := []cluster.Derivation{cluster.Own, cluster.Constellation, cluster.ConstellationLibrary}
	if err := u.Done(); err != nil {
		return nil, err
	}
	switch {
	case len(sources) != 1:
		return nil, fmt.Errorf("%w: kms://cluster-kms needs one of the parameters \"file\", \"credential\", \"constellationFile\", \"wrappedFile\", \"sealedFile\", \"keyFile\", \"keyCredential\" and \"key\"", kms.ErrURI)
	case sources["sealedFile"] != "" && given == nil:
		return nil, ErrSealed
	case (sources["wrappedFile"] == "") != (wrappedBy == ""):
		return nil, fmt.Errorf("%w: \"wrappedFile\" and \"wrappedBy\" go together", kms.ErrURI)
	case !slices.Contains(known, derivation):
		return nil, fmt.Errorf("%w: the parameter \"derivation\" is constellation, constellation-library, or left out", kms.ErrURI)
	case noSalt != "" && (noSalt != "true" || saltText+saltFile != ""):
		return nil, fmt.Errorf("%w: the parameter \"noSalt\" is true, and there is no salt beside it", kms.ErrURI)
	case saltText != "" && saltFile != "", sources["constellationFile"] != "" && saltText+saltFile != "":
		return nil, fmt.Errorf("%w: kms://cluster-kms takes its salt from one place", kms.ErrURI)
	}
	opts := cluster.Options{Derivation: derivation}
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
	case sources["sealedFile"] != "":
		opts.MasterSecret, err = copyOf(given)
	case wrappedBy != "":
		opts.MasterSecret, err = unwrapMaster(ctx, sources["wrappedFile"], wrappedBy)
	case sources["key"] != "":
		opts.MasterSecret, err = masterFromText(sources["key"])
	case sources["keyFile"] != "":
		opts.MasterSecret, err = masterInBase64(config.ReadSecretFile(sources["keyFile"], maxBase64))
	case sources["keyCredential"] != "":
		opts.MasterSecret, err = masterInBase64(config.ReadCredential(sources["keyCredential"], maxBase64))
	default:
		opts.MasterSecret, opts.Salt, err = masterOfConstellation(sources["constellationFile"])
	}
	if err != nil {
		return nil, err
	}
	defer opts.MasterSecret.Close()
	if derivation != cluster.Own {
		if err := fitsConstellation(opts, noSalt != "", sources["file"]+sources["credential"] != ""); err != nil {
			return nil, err
		}
	}
	return cluster.New(opts)
}

// fitsConstellation refuses what Constellation could not have had, and what would
// silently give other keys than it had.
func fitsConstellation(opts cluster.Options, noSalt, raw bool) error {
	if len(opts.Salt) == 0 && !noSalt {
		return fmt.Errorf("%w: there is no salt, and Constellation always had one (hint: salt, saltFile or constellationFile; noSalt=true for keys that were derived here without one)", kms.ErrURI)
	}
	if !raw {
		return nil
	}
	return opts.MasterSecret.Use(func(b []byte) error {
		text := bytes.TrimSpace(b)
		if decoded, err := base64.StdEncoding.Strict().DecodeString(string(text)); err == nil && len(decoded) >= cluster.MinMasterSecret && bytes.HasSuffix(text, []byte("=")) {
			secret.Wipe(decoded)
			return fmt.Errorf("%w: the file holds base64, and \"file\" and \"credential\" are for raw bytes: another secret would be used (hint: keyFile, or keyCredential)", kms.ErrURI)
		}
		return nil
	})
}

// maxBase64 bounds a master secret in base64, with the line's end.
const maxBase64 = cluster.MaxMasterSecret*4/3 + 8

// masterInBase64 reads what the parameter "key" would have, from elsewhere.
func masterInBase64(text *secret.Bytes, err error) (*secret.Bytes, error) {
	if err != nil {
		return nil, fmt.Errorf("master secret: %w", err)
	}
	defer text.Close()
	var master *secret.Bytes
	err = text.Use(func(b []byte) (err error) {
		raw, err := unbase64(bytes.TrimRight(b, "\r\n"))
		if err != nil || len(raw) == 0 {
			return errors.New("master secret: it is not base64") // the decoder's own error names bytes of it
		}
		master, err = secret.From(raw)
		return err
	})
	return master, err
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
