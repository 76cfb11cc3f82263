package keyservice

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/localweb"
	"github.com/keyagent/keyagent/kms/setup"
)

// Config is the configuration file of keyagent serve. docs/configuration.md
// explains each field.
type Config struct {
	Listen string    `yaml:"listen"`
	TLS    TLSConfig `yaml:"tls"`
	Policy string    `yaml:"policy"`
	KMS    string    `yaml:"kms"`
	// OldKMS open keys that were made under them, until those are wrapped again
	// under KMS.
	OldKMS  []string `yaml:"old_kms,omitempty"`
	Storage string   `yaml:"storage"`
	// RecordKey is the ID of the key that authenticates the records, if the
	// audit log does not have it.
	RecordKey string `yaml:"record_key,omitempty"`
	// Rewrap is how often keys that are not under the KEK in force are wrapped
	// again; never by default.
	Rewrap string `yaml:"rewrap,omitempty"`
	Audit  string `yaml:"audit"`
	// Metrics is a loopback address for /metrics, /healthz and /readyz. MetricsRemote
	// is the operator's word that it may be another one.
	Metrics       string `yaml:"metrics,omitempty"`
	MetricsRemote bool   `yaml:"metrics_remote,omitempty"`
	// TPM, if set, lets clients demand the service's own evidence.
	TPM *kinds.TPMConfig `yaml:"tpm,omitempty"`
	// Evidence, if set, does so too: kinds such as snp and tpm, or auto alone for
	// the strongest that the machine has.
	Evidence []string `yaml:"evidence,omitempty"`
	// Endorsements says whom to ask for what a client's evidence does not carry.
	// Unset: nobody, since a stranger could make the service ask.
	Endorsements kinds.EndorsementConfig `yaml:"endorsements,omitempty"`
	// MaxUnattested bounds connections that have not attested yet.
	MaxUnattested int `yaml:"max_unattested,omitempty"`
	// MaxAttested bounds connections that have, and MaxConnectionsEach those of one
	// machine, whose oldest gives way to its newest.
	MaxAttested        int `yaml:"max_attested,omitempty"`
	MaxConnectionsEach int `yaml:"max_connections_each,omitempty"`
	// HandshakeTimeout bounds a handshake with its attestation.
	HandshakeTimeout string `yaml:"handshake_timeout,omitempty"`
	// Admin is the path of the socket for keyagent volume and keyagent kms. Unset: there
	// is none.
	Admin string `yaml:"admin,omitempty"`
	// Join are other key services over the same storage: they give the master secret, and
	// say what they have seen of volumes.
	Join []keyclient.ServerConfig `yaml:"join,omitempty"`
	// Recovery, if set, lets a person have a volume's key once enough operators approve.
	Recovery *RecoveryConfig `yaml:"recovery,omitempty"`
	// InitRecords and InitAudit are an operator's word that what is empty may be so.
	InitRecords bool `yaml:"-"`
	InitAudit   bool `yaml:"-"`
}

// TLSConfig names the certificate of the service.
type TLSConfig struct {
	Certificate string `yaml:"certificate"`
	Key         string `yaml:"key"`
}

// issuers makes the service's own evidence, or none if it is not configured.
func (c *Config) issuers(ctx context.Context, source endorsement.Source, log *slog.Logger) ([]attestation.Issuer, error) {
	opts := kinds.IssuerOptions{Endorsements: source, Log: func(msg string, err error) { log.Warn(msg, "error", err) }}
	names := c.Evidence
	switch {
	case c.TPM == nil && len(names) == 0:
		return nil, nil
	case len(names) == 0:
		names = []string{string(attestation.TPM)}
	case len(names) == 1 && names[0] == "auto":
		names = nil
	}
	var err error
	if c.TPM != nil {
		if opts.TPM, err = c.TPM.Options(); err != nil {
			return nil, failure.New(failure.Configuration, fmt.Errorf("tpm: %w", err), "")
		}
	}
	opts.TPM.Shared = true // strangers ask too, and may never go on
	if opts.Kinds, err = kinds.All().Parse(names); err != nil {
		return nil, failure.New(failure.Configuration, err, "")
	}
	issuers, findings, err := kinds.All().Issuers(ctx, opts)
	for _, f := range findings {
		log.Info("own evidence", "kind", f.Kind, "used", f.Used, "why", f.Why)
	}
	if errors.Is(err, attestation.ErrNoDevice) {
		return nil, failure.New(failure.NoDevice, err, "evidence: in the configuration names what this machine has")
	}
	if err != nil {
		return nil, failure.New(failure.Configuration, err, "")
	}
	return issuers, nil
}

const defaultMaxUnattested = 512

// LoadConfig reads and checks a configuration file. Flags in override replace
// the file's fields if they are not empty.
func LoadConfig(path string, override Config) (*Config, error) {
	c := &Config{}
	doc, _, err := config.ReadFile(path, c)
	if err != nil {
		return nil, failure.New(failure.Configuration, err, config.Hint(err))
	}
	// Files that the configuration names lie where it says, or beside it.
	for _, p := range []*string{&c.TLS.Certificate, &c.TLS.Key, &c.Policy, &c.Audit, &c.Admin} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(path), *p)
		}
	}
	for _, o := range []struct{ from, to *string }{
		{&override.Listen, &c.Listen}, {&override.Policy, &c.Policy}, {&override.KMS, &c.KMS},
		{&override.Storage, &c.Storage}, {&override.Audit, &c.Audit}, {&override.Metrics, &c.Metrics},
	} {
		if *o.from != "" {
			*o.to = *o.from
		}
	}
	c.Join = append(c.Join, override.Join...)
	for _, d := range []struct {
		field *int
		value int
	}{
		{&c.MaxUnattested, defaultMaxUnattested}, {&c.MaxAttested, atls.DefaultMaxAttested}, {&c.MaxConnectionsEach, atls.DefaultMaxEach},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	for _, f := range []struct {
		value string
		path  []any
	}{
		{c.Listen, []any{"listen"}}, {c.TLS.Certificate, []any{"tls", "certificate"}}, {c.TLS.Key, []any{"tls", "key"}},
		{c.Policy, []any{"policy"}}, {c.KMS, []any{"kms"}}, {c.Storage, []any{"storage"}}, {c.Audit, []any{"audit"}},
	} {
		if f.value == "" {
			return nil, failure.New(failure.Configuration, doc.Errorf(f.path, "must be set"), "")
		}
	}
	for _, f := range []struct {
		value int
		name  string
	}{{c.MaxUnattested, "max_unattested"}, {c.MaxAttested, "max_attested"}, {c.MaxConnectionsEach, "max_connections_each"}} {
		if f.value < 1 || f.value > 100_000 {
			return nil, failure.New(failure.Configuration, doc.Errorf([]any{f.name}, "must be from 1 to 100000"), "")
		}
	}
	if c.Metrics != "" && !c.MetricsRemote && !localweb.Local(c.Metrics) {
		return nil, failure.New(failure.Configuration, doc.Errorf([]any{"metrics"}, "%q is not an address of the loopback interface", c.Metrics),
			"127.0.0.1:PORT, or metrics_remote: true if others may read them")
	}
	if _, err := c.timeout(); err != nil {
		return nil, failure.New(failure.Configuration, doc.Errorf([]any{"handshake_timeout"}, "%w", err), "")
	}
	if _, err := c.rewrapEvery(); err != nil {
		return nil, failure.New(failure.Configuration, doc.Errorf([]any{"rewrap"}, "%w", err), "")
	}
	if err := c.checkSecrets(path, doc); err != nil {
		return nil, err
	}
	if err := c.checkJoin(doc, filepath.Dir(path)); err != nil {
		return nil, err
	}
	return c, nil
}

// checkJoin refuses to ask others where there is nothing to ask them for.
func (c *Config) checkJoin(doc *config.Document, dir string) error {
	for i := range c.Join {
		if err := c.Join[i].Check(doc, dir, "join", i); err != nil {
			return failure.New(failure.Configuration, err, "")
		}
	}
	at := []any{"join"}
	switch {
	case len(c.Join) == 0 && setup.Joined(c.KMS):
		return failure.New(failure.Configuration, doc.Errorf(at, "empty, and kms: leaves the master secret to other key services"), "name one with join or --join")
	case len(c.Join) == 0:
		return nil
	case c.TPM == nil && len(c.Evidence) == 0:
		return failure.New(failure.Configuration, doc.Errorf(at, "key services prove themselves to each other, and this one has no evidence"), "set evidence, for example to [auto]")
	case strings.HasPrefix(c.Storage, "storage://file"):
		return failure.New(failure.Configuration, doc.Errorf(at, "a storage of the kind file is for one key service"), "replicas share a bucket, a container or etcd: docs/replicas.md")
	}
	return nil
}

// checkSecrets refuses a file that others can read if a URI in it holds a secret.
func (c *Config) checkSecrets(path string, doc *config.Document) error {
	uris := []struct {
		uri  string
		path []any
	}{{c.KMS, []any{"kms"}}, {c.Storage, []any{"storage"}}}
	for i, uri := range c.OldKMS {
		uris = append(uris, struct {
			uri  string
			path []any
		}{uri, []any{"old_kms", i}})
	}
	for _, u := range uris {
		name, instead := setup.HoldsSecret(u.uri)
		if name == "" {
			continue
		}
		if err := config.CheckSecretFile(path); err != nil {
			return failure.New(failure.Configuration, doc.Errorf(u.path, "the parameter %q holds a secret: %w", name, err),
				fmt.Sprintf("put the secret into a file of its own, and name it with the parameter %q", instead))
		}
	}
	return nil
}

// rewrapEvery is 0 for never.
func (c *Config) rewrapEvery() (time.Duration, error) {
	if c.Rewrap == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(c.Rewrap)
	if err == nil && d < time.Minute {
		err = errors.New("must be at least 1m")
	}
	return d, err
}

func (c *Config) timeout() (time.Duration, error) {
	if c.HandshakeTimeout == "" {
		return atls.DefaultTimeout, nil
	}
	d, err := time.ParseDuration(c.HandshakeTimeout)
	if err == nil && (d < time.Second || d > 10*time.Minute) {
		err = errors.New("must be from 1s to 10m")
	}
	return d, err
}
