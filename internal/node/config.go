package node

import (
	"errors"
	"net"
	"path/filepath"
	"slices"
	"time"

	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/confine"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

// Config is the configuration file of a node. docs/configuration.md explains each
// field. A node without volumes is a good node: a control plane that only wants a
// KEK has none, and so has one whose volumes all come from a CSI driver.
type Config struct {
	Servers      []keyclient.ServerConfig `yaml:"servers"`
	ServerPolicy string                   `yaml:"server_policy,omitempty"`
	TPM          kinds.TPMConfig          `yaml:"tpm,omitempty"`
	// Evidence names the kinds to give, such as snp and tpm. Empty: the strongest
	// that the machine has.
	Evidence     []string                `yaml:"evidence,omitempty"`
	Endorsements kinds.EndorsementConfig `yaml:"endorsements,omitempty"`
	Azure        AzureConfig             `yaml:"azure,omitempty"`
	Socket       string                  `yaml:"socket,omitempty"`
	StateDir     string                  `yaml:"state_dir,omitempty"`
	// OfflineDir is where keys are kept for an outage, sealed to the TPM.
	OfflineDir string      `yaml:"offline_dir,omitempty"`
	Callers    []Caller    `yaml:"callers,omitempty"`
	Dynamic    []Dynamic   `yaml:"dynamic,omitempty"`
	Retry      RetryConfig `yaml:"retry,omitempty"`
	// Witness is where this node remembers the key service's audit log: tpm, a file's
	// absolute path, or memory for this process alone. Default tpm where there is one, else
	// a file in state_dir.
	Witness string   `yaml:"witness,omitempty"`
	Volumes []Volume `yaml:"volumes,omitempty"`
	// Crypttab is a file of crypttab(5), whose lines with the option keyagent are
	// volumes too. Empty: none.
	Crypttab string `yaml:"crypttab,omitempty"`
	// KeySocket hands keys to systemd-cryptsetup. Empty: nobody is given a key.
	KeySocket KeySocket `yaml:"key_socket,omitempty"`
	// Constellation is a socket for programs that were written for Constellation's key
	// service. Callers say who may ask it for what.
	Constellation Constellation `yaml:"constellation,omitempty"`
	// Watch is how often the headers of open volumes are compared with their disks.
	// Default 5m, off for never.
	Watch string `yaml:"watch,omitempty"`
	// Metrics is a loopback address for /metrics. Empty: none.
	Metrics string `yaml:"metrics,omitempty"`
	// DeviceTimeout is how long a disk may take to answer. Default 30s.
	DeviceTimeout string `yaml:"device_timeout,omitempty"`

	watch, deviceTimeout time.Duration
	lines                []string // IDs of the volumes that are lines of crypttab
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

	retry keyclient.Retry
}

// The defaults of fields that are left out.
const (
	DefaultSocket        = "/run/keyagent/agent.sock"
	defaultStateDir      = "/run/keyagent/volumes"
	defaultOfflineDir    = "/var/lib/keyagent-offline"
	defaultWatch         = 5 * time.Minute
	defaultDeviceTimeout = 30 * time.Second
)

// Load reads and checks a configuration file.
func Load(path string) (*Config, error) {
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
	if c.OfflineDir == "" {
		c.OfflineDir = defaultOfflineDir
	}
	if c.ServerPolicy != "" && !filepath.IsAbs(c.ServerPolicy) {
		c.ServerPolicy = filepath.Join(dir, c.ServerPolicy)
	}
	if len(c.Servers) == 0 {
		return doc.Errorf([]any{"servers"}, "empty: there is no key service to ask")
	}
	for i := range c.Servers {
		if err := c.Servers[i].Check(doc, dir, "servers", i); err != nil {
			return err
		}
		if s := &c.Servers[i]; s.CA == "" && len(s.Pins) == 0 {
			return doc.Errorf([]any{"servers", i}, "neither ca nor pins: the server could not be told from another")
		}
	}
	if _, err := kinds.All().Parse(c.Evidence); err != nil {
		return doc.Errorf([]any{"evidence"}, "%w", err)
	}
	if err := c.Endorsements.Check(); err != nil {
		return doc.Errorf([]any{"endorsements"}, "%w", err)
	}
	if err := c.durations(doc); err != nil {
		return err
	}
	if host, _, err := net.SplitHostPort(c.Metrics); c.Metrics != "" && (err != nil || !net.ParseIP(host).IsLoopback()) {
		return doc.Errorf([]any{"metrics"}, "must be a loopback address and a port, such as 127.0.0.1:9465")
	}
	for i := range c.Callers {
		if err := c.Callers[i].check(doc, i); err != nil {
			return err
		}
	}
	for i := range c.Dynamic {
		if err := c.Dynamic[i].check(); err != nil {
			return doc.Errorf(place("dynamic", i, err), "%w", bare(err))
		}
	}
	if err := c.checkWitness(); err != nil {
		return doc.Errorf([]any{"witness"}, "%w", err)
	}
	if err := c.checkConstellation(); err != nil {
		return doc.Errorf([]any{"constellation", "socket"}, "%w", err)
	}
	return c.checkVolumes(doc)
}

func (c *Config) checkVolumes(doc *config.Document) error {
	for i := range c.Volumes {
		if err := c.Volumes[i].describe(); err != nil {
			return doc.Errorf(place("volumes", i, err), "%w", bare(err))
		}
	}
	named := len(c.Volumes)
	if c.Crypttab != "" {
		if !filepath.IsAbs(c.Crypttab) {
			return doc.Errorf([]any{"crypttab"}, "must be an absolute path")
		}
		if err := c.addCrypttab(c.Crypttab); err != nil {
			return doc.Errorf([]any{"crypttab"}, "%w", err)
		}
	}
	if err := c.checkKeySocket(doc); err != nil {
		return err
	}
	switch i, err := CheckVolumes(c.Volumes); {
	case err != nil && i >= named:
		return doc.Errorf([]any{"crypttab"}, "%s, %q: %w", c.Crypttab, c.Volumes[i].ID, err)
	case err != nil:
		return doc.Errorf(place("volumes", i, err), "%w", bare(err))
	}
	return nil
}

// place is where in the file the field of an error stands.
func place(list string, i int, err error) []any {
	path := []any{list, i}
	var f *FieldError
	if errors.As(err, &f) {
		path = append(path, f.Field)
		if f.Index >= 0 {
			path = append(path, f.Index)
		}
	}
	return path
}

// bare is an error without the name of its field, which the place says.
func bare(err error) error {
	var f *FieldError
	if errors.As(err, &f) {
		return f.Err
	}
	return err
}

// durations parses what is a time.
func (c *Config) durations(doc *config.Document) error {
	r := &c.Retry
	r.retry = keyclient.DefaultRetry
	c.watch, c.deviceTimeout = defaultWatch, defaultDeviceTimeout
	watch := c.Watch
	if watch == "off" {
		c.watch, watch = 0, ""
	}
	for _, f := range []struct {
		path []any
		text string
		to   *time.Duration
		min  time.Duration
	}{
		{[]any{"retry", "budget"}, r.Budget, &r.retry.Budget, time.Nanosecond},
		{[]any{"retry", "first"}, r.First, &r.retry.First, time.Nanosecond},
		{[]any{"retry", "max"}, r.Max, &r.retry.Max, time.Nanosecond},
		{[]any{"watch"}, watch, &c.watch, time.Second},
		{[]any{"device_timeout"}, c.DeviceTimeout, &c.deviceTimeout, time.Second},
	} {
		if f.text == "" {
			continue
		}
		d, err := time.ParseDuration(f.text)
		if err != nil || d < f.min || d > 24*time.Hour {
			return doc.Errorf(f.path, "must be a duration of at most 24h, such as 30s")
		}
		*f.to = d
	}
	return nil
}

// RetryPolicy bounds how long the key service is tried.
func (c *Config) RetryPolicy() keyclient.Retry { return c.Retry.retry }

// WatchEvery is how often headers are compared, 0 for never.
func (c *Config) WatchEvery() time.Duration { return c.watch }

// DeviceWait is how long a disk may take to answer.
func (c *Config) DeviceWait() time.Duration { return c.deviceTimeout }

// CheckServing says whether an agent could serve with this configuration. The
// verbs that run alone need less.
func (c *Config) CheckServing() error {
	if len(c.Callers) == 0 {
		return failure.Newf(failure.Configuration, "name at least root, uid: 0", "callers: empty: nobody could use the local API")
	}
	for _, id := range c.lines {
		for _, op := range []string{"open", "close"} {
			if !c.Allows(unixsocket.Peer{}, op, id) {
				return failure.Newf(failure.Configuration, "add it for uid: 0", "callers: the unit of crypttab's line for volume %q runs as root, which may not %s it", id, op)
			}
		}
	}
	return nil
}

// Volume returns one configured volume.
func (c *Config) Volume(id string) (Volume, bool) {
	i := slices.IndexFunc(c.Volumes, func(v Volume) bool { return v.ID == id })
	if i < 0 {
		return Volume{}, false
	}
	return c.Volumes[i], true
}

// ErrUnknownVolume means that neither the configuration nor an earlier caller
// described a volume.
var ErrUnknownVolume = errors.New("volume is not configured here")

// UnknownVolume is that error with its class.
func UnknownVolume(id string) error {
	return failure.Newf(failure.NotFound, "the agent's configuration lists its volumes, and names crypttab if its lines are volumes; both are read when the agent starts", "%w: %.128q", ErrUnknownVolume, id)
}

// Files are the paths of the files that the configuration names, without its own, as a
// copy of it elsewhere would need them.
func (c *Config) Files() ([]string, error) {
	var out []string
	for _, s := range c.Servers {
		if s.CA != "" {
			out = append(out, s.CA)
		}
	}
	out = append(out, c.TPM.EKIntermediates...)
	out = append(out, c.TPM.AKIntermediates...)
	if c.ServerPolicy != "" {
		p, err := kinds.LoadPolicy(c.ServerPolicy)
		if err != nil {
			return nil, failure.New(failure.Configuration, err, "keyagent policy check says what is wrong")
		}
		out = append(append(out, c.ServerPolicy), p.Files()...)
	}
	return out, nil
}

// Reach is what a process touches of the machine that asks for keys with this
// configuration, and opens no volume.
func (c *Config) Reach() (confine.Paths, error) {
	files, err := c.Files()
	write := []string{c.StateDir, c.Endorsements.Cache}
	if filepath.IsAbs(c.Witness) {
		write = append(write, filepath.Dir(c.Witness))
	}
	return confine.Paths{
		Read: append(files, c.TPM.EventLog), Write: write,
		Devices: []string{c.TPM.Device}, Evidence: true,
	}, err
}
