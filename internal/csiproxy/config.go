package csiproxy

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/node"
)

// Config is the configuration file of the proxy. It belongs to what is measured of the
// node: it alone can leave a volume without encryption.
type Config struct {
	Driver string `yaml:"driver"` // the driver's own socket
	Listen string `yaml:"listen"` // the socket for kubelet and for the sidecars of the controller
	Agent  string `yaml:"agent,omitempty"`
	// Registration is a socket in kubelet's plugins_registry at which the proxy registers
	// itself. Empty: another program does, such as node-driver-registrar.
	Registration string `yaml:"registration,omitempty"`
	// Private is a folder that the driver reaches by the same path. Devices are published
	// below it.
	Private string `yaml:"private"`
	// Kubelet is the folder in which all paths lie that kubelet asks for.
	Kubelet string `yaml:"kubelet,omitempty"`
	// Prefix begins the IDs of volumes at the agent and the key service. Each driver has
	// its own: two drivers may give one name to two volumes.
	Prefix string `yaml:"prefix"`
	// Filesystem is made where the claim names none.
	Filesystem string `yaml:"filesystem,omitempty"`
	// Discards tells the storage what is unused.
	Discards bool `yaml:"discards,omitempty"`
	// Integrity authenticates what is on the volumes: one of [node.Integrities], or empty. One that was
	// made without is not staged.
	Integrity string `yaml:"integrity,omitempty"`
	// SharedClasses may be attached as block devices that several nodes write, which need
	// a cluster filesystem. Empty: none.
	SharedClasses []string `yaml:"shared_classes,omitempty"`
	// PlainClasses are passed on to the driver as they are, without encryption. Empty:
	// none.
	PlainClasses []string `yaml:"plain_classes,omitempty"`

	resolved string // Kubelet, without links
}

// The defaults of fields that are left out.
const (
	DefaultKubelet    = "/var/lib/kubelet"
	DefaultFilesystem = "ext4"
)

// ClassKey is the parameter by which a StorageClass names itself: one of the plain or
// the shared classes. It stands in the attributes of the volumes that it made.
const ClassKey = "keyagent.class"

// SourceKey is the attribute of a volume that was made of another one, or of a snapshot of
// it: what the driver calls that.
const SourceKey = "keyagent.source"

// Load reads and checks a configuration file.
func Load(path string) (*Config, error) {
	c := &Config{}
	doc, _, err := config.ReadFile(path, c)
	if err != nil {
		return nil, failure.New(failure.Configuration, err, config.Hint(err))
	}
	if err := c.check(doc); err != nil {
		return nil, failure.New(failure.Configuration, err, "docs/csi.md has an example")
	}
	return c, nil
}

func (c *Config) check(doc *config.Document) error {
	for field, v := range map[*string]string{&c.Agent: node.DefaultSocket, &c.Kubelet: DefaultKubelet, &c.Filesystem: DefaultFilesystem} {
		if *field == "" {
			*field = v
		}
	}
	for _, p := range []struct {
		field, value string
		optional     bool
	}{
		{"driver", c.Driver, false}, {"listen", c.Listen, false}, {"agent", c.Agent, false},
		{"registration", c.Registration, true}, {"private", c.Private, false}, {"kubelet", c.Kubelet, false},
	} {
		if p.value == "" && p.optional {
			continue
		}
		if !filepath.IsAbs(p.value) || filepath.Clean(p.value) != p.value || p.value == "/" || strings.ContainsRune(p.value, 0) {
			return doc.Errorf([]any{p.field}, "must be an absolute, plain path")
		}
	}
	// Kubelet names some paths as it is told its folder, and others as they really are.
	if real, err := filepath.EvalSymlinks(c.Kubelet); err == nil {
		c.resolved = real
	}
	if c.Driver == c.Listen {
		return doc.Errorf([]any{"listen"}, "is the driver's own socket")
	}
	if c.Prefix == "" || !policy.ValidVolume(c.Prefix+"x") || len(c.Prefix) > maxPrefix {
		return doc.Errorf([]any{"prefix"}, "must be 1 to %d letters, digits, dots, dashes or underscores", maxPrefix)
	}
	if !slices.Contains(node.Filesystems, c.Filesystem) {
		return doc.Errorf([]any{"filesystem"}, "%.40q is not supported: %s", c.Filesystem, strings.Join(node.Filesystems, ", "))
	}
	switch {
	case c.Integrity == "none":
		c.Integrity = ""
	case c.Integrity != "" && !slices.Contains(node.Integrities, c.Integrity):
		return doc.Errorf([]any{"integrity"}, "%.40q is not supported: %s, or none", c.Integrity, strings.Join(node.Integrities, ", "))
	case c.Integrity != "" && c.Discards:
		return doc.Errorf([]any{"discards"}, "a volume with integrity cannot pass TRIM on")
	case c.Integrity != "" && len(c.SharedClasses) > 0:
		return doc.Errorf([]any{"shared_classes"}, "a volume with integrity has a journal that one node keeps")
	}
	for field, classes := range map[string][]string{"plain_classes": c.PlainClasses, "shared_classes": c.SharedClasses} {
		for i, name := range classes {
			if err := checkClass(name); err != nil {
				return doc.Errorf([]any{field, i}, "%w", err)
			}
		}
	}
	for i, name := range c.SharedClasses {
		if slices.Contains(c.PlainClasses, name) {
			return doc.Errorf([]any{"shared_classes", i}, "%q is a plain class too", name)
		}
	}
	return nil
}

func checkClass(name string) error {
	if !policy.ValidVolume(name) {
		return errors.New("must be the name of a class: letters, digits, dots, dashes and underscores")
	}
	return nil
}
