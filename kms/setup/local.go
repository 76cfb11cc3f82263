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

// clusterKMS opens the cluster KMS. given is its master secret, or nil if the URI itself leads
// to it.
func clusterKMS(ctx context.Context, u *kms.URI, given *kms.Secret) (*cluster.KMS, error) {
	c, err := clusterOf(u)
	if err != nil {
		return nil, err
	}
	opts := cluster.Options{Derivation: c.derivation}
	if opts.Salt, err = c.salt(); err != nil {
		return nil, err
	}
	if given != nil {
		opts.MasterSecret, err = given.Clone()
	} else {
		opts.MasterSecret, err = c.load(ctx)
	}
	if err != nil {
		return nil, err
	}
	defer opts.MasterSecret.Close()
	if c.derivation != cluster.Own {
		if err := fitsConstellation(opts, c.noSalt, c.sources["file"]+c.sources["credential"] != ""); err != nil {
			return nil, err
		}
	}
	return cluster.New(opts)
}

// clusterURI is what a URI says of a cluster KMS.
type clusterURI struct {
	sources            map[string]string // one, of where the master secret is
	wrappedBy          string
	saltText, saltFile string
	noSalt             bool
	derivation         cluster.Derivation
}

// clusterOf takes the parameters.
func clusterOf(u *kms.URI) (c clusterURI, err error) {
	c.sources = map[string]string{}
	for _, name := range []string{"file", "credential", "key", "keyFile", "keyCredential", "constellationFile", "wrappedFile", "sealedFile", "joined"} {
		if v := u.Optional(name); v != "" {
			c.sources[name] = v
		}
	}
	c.saltText, c.saltFile = u.Optional("salt"), u.Optional("saltFile")
	noSalt := u.Optional("noSalt")
	c.noSalt = noSalt != ""
	c.wrappedBy = u.Optional("wrappedBy")
	c.derivation = cluster.Derivation(u.Optional("derivation"))
	known := []cluster.Derivation{cluster.Own, cluster.Constellation, cluster.ConstellationLibrary}
	if err := u.Done(); err != nil {
		return c, err
	}
	switch joined := c.sources["joined"]; {
	case len(c.sources) != 1:
		return c, fmt.Errorf("%w: kms://cluster-kms needs one of the parameters \"file\", \"credential\", \"constellationFile\", \"wrappedFile\", \"sealedFile\", \"joined\", \"keyFile\", \"keyCredential\" and \"key\"", kms.ErrURI)
	case joined != "" && joined != "true":
		return c, fmt.Errorf("%w: the parameter \"joined\" is true, or left out", kms.ErrURI)
	case (c.sources["wrappedFile"] == "") != (c.wrappedBy == ""):
		return c, fmt.Errorf("%w: \"wrappedFile\" and \"wrappedBy\" go together", kms.ErrURI)
	case !slices.Contains(known, c.derivation):
		return c, fmt.Errorf("%w: the parameter \"derivation\" is constellation, constellation-library, or left out", kms.ErrURI)
	case c.noSalt && (noSalt != "true" || c.saltText+c.saltFile != ""):
		return c, fmt.Errorf("%w: the parameter \"noSalt\" is true, and there is no salt beside it", kms.ErrURI)
	case c.saltText != "" && c.saltFile != "", c.sources["constellationFile"] != "" && c.saltText+c.saltFile != "":
		return c, fmt.Errorf("%w: kms://cluster-kms takes its salt from one place", kms.ErrURI)
	}
	return c, nil
}

// load reads the master secret.
func (c *clusterURI) load(ctx context.Context) (*kms.Secret, error) {
	for source, value := range c.sources {
		switch source {
		case "file":
			return cluster.LoadMasterSecret(value)
		case "credential":
			return cluster.LoadCredential(value)
		case "sealedFile":
			return nil, ErrSealed
		case "joined":
			return nil, ErrJoined
		case "wrappedFile":
			return unwrapMaster(ctx, value, c.wrappedBy)
		case "key":
			return masterFromText(value)
		case "keyFile":
			return masterInBase64(config.ReadSecretFile(value, maxBase64))
		case "keyCredential":
			return masterInBase64(config.ReadCredential(value, maxBase64))
		case "constellationFile":
			master, _, err := masterOfConstellation(value)
			return master, err
		}
	}
	return nil, kms.ErrURI // clusterOf found one
}

// salt reads the salt, if there is one.
func (c *clusterURI) salt() (salt []byte, err error) {
	switch path := c.sources["constellationFile"]; {
	case c.saltText != "":
		if salt, err = unbase64([]byte(c.saltText)); err != nil {
			return nil, fmt.Errorf("%w: the parameter \"salt\" is base64", kms.ErrURI)
		}
	case c.saltFile != "":
		if salt, err = config.ReadPublicFile(c.saltFile, cluster.MaxMasterSecret); err != nil {
			return nil, fmt.Errorf("salt: %w", err)
		}
	case path != "":
		var master *kms.Secret
		if master, salt, err = masterOfConstellation(path); err == nil {
			err = master.Close()
		}
	}
	return salt, err
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
