package agent

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/keyagent/keyagent/attestation/policy"
	hardware "github.com/keyagent/keyagent/attestation/setup"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
)

// Config is the configuration file of keyagent agent and of the verbs that run
// without it. docs/configuration.md explains each field.
type Config struct {
	Servers      []ServerConfig `yaml:"servers"`
	ServerPolicy string         `yaml:"server_policy,omitempty"`
	TPM          TPMConfig      `yaml:"tpm,omitempty"`
	// Evidence names the kinds to give, such as snp and tpm. Empty: the strongest
	// that the machine has.
	Evidence     []string                   `yaml:"evidence,omitempty"`
	Endorsements hardware.EndorsementConfig `yaml:"endorsements,omitempty"`
	Azure        AzureConfig                `yaml:"azure,omitempty"`
	Socket       string                     `yaml:"socket,omitempty"`
	StateDir     string                     `yaml:"state_dir,omitempty"`
	Callers      []Caller                   `yaml:"callers"`
	Retry        RetryConfig                `yaml:"retry,omitempty"`
	Volumes      []VolumeConfig             `yaml:"volumes"`
}

// ServerConfig is one endpoint of the key service.
type ServerConfig struct {
	Address string   `yaml:"address"`
	Name    string   `yaml:"name,omitempty"` // in the certificate; default the host of address
	CA      string   `yaml:"ca,omitempty"`   // PEM file
	Pins    []string `yaml:"pins,omitempty"` // sha256:HEX of the public key

	roots *x509.CertPool
	pins  [][32]byte
}

// TPMConfig names the TPM of this machine.
type TPMConfig struct {
	Device   string `yaml:"device,omitempty"`
	AK       string `yaml:"ak,omitempty"` // auto, own or cloud
	EK       string `yaml:"ek,omitempty"`
	EKPin    string `yaml:"ek_pin,omitempty"`
	EventLog string `yaml:"event_log,omitempty"`
}

// AzureConfig names what a confidential VM of Azure talks to.
type AzureConfig struct {
	// Metadata is the base URL of the instance's metadata service.
	Metadata string `yaml:"metadata,omitempty"`
	// Attestation is the URL of a Microsoft Attestation service. Empty: no token
	// is ever asked for.
	Attestation string `yaml:"attestation,omitempty"`
}

// RetryConfig bounds how long the key service is tried.
type RetryConfig struct {
	Budget string `yaml:"budget,omitempty"`
	First  string `yaml:"first,omitempty"`
	Max    string `yaml:"max,omitempty"`

	budget, first, max time.Duration
}

// Caller is who may use the local API.
type Caller struct {
	UID        *uint32  `yaml:"uid"`
	Operations []string `yaml:"operations"`
	Volumes    []string `yaml:"volumes"`
}

// VolumeConfig is one volume of this node.
type VolumeConfig struct {
	ID         string   `yaml:"id"`
	Device     string   `yaml:"device"`
	Name       string   `yaml:"name,omitempty"`       // of the mapping; default the ID
	Format     bool     `yaml:"format,omitempty"`     // explicit intent: create it if it does not exist
	Filesystem string   `yaml:"filesystem,omitempty"` // ext4, or none
	Mount      string   `yaml:"mount,omitempty"`
	Options    []string `yaml:"options,omitempty"` // of the mount; default nosuid, nodev
	Optional   bool     `yaml:"optional,omitempty"`
	Discards   bool     `yaml:"discards,omitempty"`
}

// The defaults of fields that are left out.
const (
	DefaultSocket   = "/run/keyagent/agent.sock"
	defaultStateDir = "/run/keyagent/volumes"
	defaultBudget   = 5 * time.Minute
	defaultFirst    = 500 * time.Millisecond
	defaultMax      = 15 * time.Second
)

// localOperations are what a caller may be allowed.
var localOperations = []string{"open", "format", "close", "status", "list"}

var mappingName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,126}$`)

// LoadConfig reads and checks a configuration file.
func LoadConfig(path string) (*Config, error) {
	c := &Config{}
	doc, _, err := config.ReadFile(path, c)
	if err != nil {
		return nil, failure.New(failure.Configuration, err, config.Hint(err))
	}
	if err := c.check(doc, filepath.Dir(path)); err != nil {
		return nil, failure.New(failure.Configuration, err, "")
	}
	return c, nil
}

func (c *Config) check(doc *config.Document, dir string) error {
	if c.Socket == "" {
		c.Socket = DefaultSocket
	}
	if c.StateDir == "" {
		c.StateDir = defaultStateDir
	}
	if c.ServerPolicy != "" && !filepath.IsAbs(c.ServerPolicy) {
		c.ServerPolicy = filepath.Join(dir, c.ServerPolicy)
	}
	if len(c.Servers) == 0 {
		return doc.Errorf([]any{"servers"}, "empty: there is no key service to ask")
	}
	for i := range c.Servers {
		if err := c.Servers[i].check(doc, dir, i); err != nil {
			return err
		}
	}
	if _, err := hardware.ParseKinds(c.Evidence); err != nil {
		return doc.Errorf([]any{"evidence"}, "%w", err)
	}
	if err := c.Endorsements.Check(); err != nil {
		return doc.Errorf([]any{"endorsements"}, "%w", err)
	}
	if err := c.Retry.check(doc); err != nil {
		return err
	}
	if len(c.Volumes) == 0 {
		return doc.Errorf([]any{"volumes"}, "empty: there is nothing to open")
	}
	ids, names, mounts := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for i := range c.Volumes {
		v := &c.Volumes[i]
		if err := v.check(doc, i); err != nil {
			return err
		}
		for _, u := range []struct {
			seen  map[string]bool
			value string
			field string
		}{{ids, v.ID, "id"}, {names, v.Name, "name"}, {mounts, v.Mount, "mount"}} {
			if u.value != "" && u.seen[u.value] {
				return doc.Errorf([]any{"volumes", i, u.field}, "%q is used twice", u.value)
			}
			u.seen[u.value] = true
		}
	}
	for i := range c.Callers {
		if err := c.Callers[i].check(doc, i); err != nil {
			return err
		}
	}
	return nil
}

func (s *ServerConfig) check(doc *config.Document, dir string, i int) error {
	at := func(field string) []any { return []any{"servers", i, field} }
	host, port, err := net.SplitHostPort(s.Address)
	if err != nil || host == "" || port == "" {
		return doc.Errorf(at("address"), "must be HOST:PORT")
	}
	if s.Name == "" {
		s.Name = host
	}
	if s.CA == "" && len(s.Pins) == 0 {
		return doc.Errorf([]any{"servers", i}, "neither ca nor pins: the server could not be told from another")
	}
	if s.CA != "" {
		path := s.CA
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return doc.Errorf(at("ca"), "%w", err)
		}
		s.roots = x509.NewCertPool()
		if !s.roots.AppendCertsFromPEM(text) {
			return doc.Errorf(at("ca"), "%s holds no certificate in PEM form", path)
		}
	}
	for n, p := range s.Pins {
		text, ok := strings.CutPrefix(p, "sha256:")
		b, err := hex.DecodeString(text)
		if !ok || err != nil || len(b) != sha256.Size {
			return doc.Errorf([]any{"servers", i, "pins", n}, "must be sha256: and 64 hex digits")
		}
		s.pins = append(s.pins, [32]byte(b))
	}
	return nil
}

func (r *RetryConfig) check(doc *config.Document) error {
	for _, f := range []struct {
		field string
		text  string
		to    *time.Duration
		unset time.Duration
	}{
		{"budget", r.Budget, &r.budget, defaultBudget},
		{"first", r.First, &r.first, defaultFirst},
		{"max", r.Max, &r.max, defaultMax},
	} {
		*f.to = f.unset
		if f.text == "" {
			continue
		}
		d, err := time.ParseDuration(f.text)
		if err != nil || d <= 0 || d > 24*time.Hour {
			return doc.Errorf([]any{"retry", f.field}, "must be a duration of at most 24h, such as 30s")
		}
		*f.to = d
	}
	return nil
}

func (c *Caller) check(doc *config.Document, i int) error {
	at := func(more ...any) []any { return append([]any{"callers", i}, more...) }
	if c.UID == nil {
		return doc.Errorf(at("uid"), "must be set")
	}
	if len(c.Operations) == 0 {
		return doc.Errorf(at("operations"), "empty: the caller may do nothing")
	}
	for n, op := range c.Operations {
		if !slices.Contains(localOperations, op) {
			return doc.Errorf(at("operations", n), "%q is not one of %s", op, strings.Join(localOperations, ", "))
		}
	}
	if len(c.Volumes) == 0 {
		return doc.Errorf(at("volumes"), "empty: the caller may touch no volume")
	}
	return nil
}

func (v *VolumeConfig) check(doc *config.Document, i int) error {
	at := func(field string) []any { return []any{"volumes", i, field} }
	if !policy.ValidVolume(v.ID) {
		return doc.Errorf(at("id"), "must be 1 to 128 letters, digits, dots, dashes or underscores")
	}
	if v.Name == "" {
		v.Name = v.ID
	}
	if !mappingName.MatchString(v.Name) {
		return doc.Errorf(at("name"), "must be 1 to 127 letters, digits, dots, dashes or underscores")
	}
	if !filepath.IsAbs(v.Device) {
		return doc.Errorf(at("device"), "must be an absolute path")
	}
	switch v.Filesystem {
	case "", "none":
		v.Filesystem = "none"
	case "ext4":
	default:
		return doc.Errorf(at("filesystem"), "%q is not supported: ext4, or none", v.Filesystem)
	}
	if v.Mount != "" {
		if !filepath.IsAbs(v.Mount) || filepath.Clean(v.Mount) == "/" {
			return doc.Errorf(at("mount"), "must be an absolute path other than /")
		}
		if v.Filesystem == "none" {
			return doc.Errorf(at("mount"), "needs filesystem: ext4")
		}
		v.Mount = filepath.Clean(v.Mount)
	}
	if v.Options == nil {
		v.Options = []string{"nosuid", "nodev"}
	}
	if _, err := mountFlags(v.Options); err != nil {
		return doc.Errorf(at("options"), "%w", err)
	}
	return nil
}

// CheckServing says whether an agent could serve with this configuration. The
// verbs that run alone need less.
func (c *Config) CheckServing() error {
	if len(c.Callers) == 0 {
		return failure.Newf(failure.Configuration, "name at least root, uid: 0", "callers: empty: nobody could use the local API")
	}
	return nil
}

// volume returns the configuration of one volume.
func (c *Config) volume(id string) (*VolumeConfig, error) {
	for i := range c.Volumes {
		if c.Volumes[i].ID == id {
			return &c.Volumes[i], nil
		}
	}
	return nil, failure.New(failure.NotFound, fmt.Errorf("%w: %q", errUnknownVolume, id), "the agent's configuration lists its volumes")
}

var errUnknownVolume = errors.New("volume is not configured here")
