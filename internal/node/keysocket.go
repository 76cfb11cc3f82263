package node

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/pattern"
)

// KeySocket is where systemd asks for the keys of volumes that it maps itself.
type KeySocket struct {
	// Path is the socket that lines of crypttab name. Empty: none.
	Path string `yaml:"path,omitempty"`
	// DropIns has a socket for each volume at the place where systemd-cryptsetup looks
	// for a key that no line names.
	DropIns   bool       `yaml:"drop_ins,omitempty"`
	Consumers []Consumer `yaml:"consumers,omitempty"`
}

// Consumer is a unit that may be given the key of a volume.
type Consumer struct {
	Volume string `yaml:"volume"` // ID
	Unit   string `yaml:"unit"`   // exact name
	// Credential is the ID in the unit's LoadCredential=. Empty: the unit runs
	// systemd-cryptsetup for the volume's mapping.
	Credential string `yaml:"credential,omitempty"`
}

// dropInFolder is where systemd-cryptsetup looks for a key, see crypttab(5).
const dropInFolder = "/run/cryptsetup-keys.d"

// systemd calls from an abstract name that tells what it wants. The kernel bounds it:
// the rest is a zero, 16 random digits and the kind of the call.
const (
	maxMappingCall    = 107 - 1 - 16 - len("/cryptsetup/")
	maxCredentialCall = 107 - 1 - 16 - len("/unit/") - len("/")
)

var (
	unitName     = pattern.New(`^[A-Za-z0-9:_.\\@-]{1,240}\.service$`)
	credentialID = pattern.New(`^[A-Za-z0-9_.:-]{1,80}$`)
)

// Paths are the sockets that the agent is to have.
func (k *KeySocket) Paths(all []Volume) []string {
	var out []string
	if k.Path != "" {
		out = append(out, k.Path)
	}
	if !k.DropIns {
		return out
	}
	for _, c := range k.Consumers {
		for _, v := range all {
			if path := filepath.Join(dropInFolder, v.Name+".key"); v.ID == c.Volume && c.Credential == "" && !slices.Contains(out, path) {
				out = append(out, path)
			}
		}
	}
	return out
}

// checkKeySocket checks who may have keys, and leaves the opening of their volumes to
// systemd.
func (c *Config) checkKeySocket(doc *config.Document) error {
	k := &c.KeySocket
	switch {
	case k.Path != "" && (!filepath.IsAbs(k.Path) || filepath.Clean(k.Path) != k.Path || len(k.Path) > 107):
		return doc.Errorf([]any{"key_socket", "path"}, "must be a plain absolute path of at most 107 bytes")
	case k.Path != "" && k.Path == c.Socket:
		return doc.Errorf([]any{"key_socket", "path"}, "is the local API's socket")
	case len(k.Consumers) == 0 && (k.Path != "" || k.DropIns):
		return doc.Errorf([]any{"key_socket", "consumers"}, "empty: nobody could be given a key")
	case len(k.Consumers) > 0 && k.Path == "" && !k.DropIns:
		return doc.Errorf([]any{"key_socket", "path"}, "empty, and drop_ins is false: nobody could ask for a key")
	}
	for i := range k.Consumers {
		if field, err := c.checkConsumer(i); err != nil {
			return doc.Errorf([]any{"key_socket", "consumers", i, field}, "%w", err)
		}
	}
	for i := range c.Volumes {
		if v := &c.Volumes[i]; slices.ContainsFunc(k.Consumers, func(one Consumer) bool { return one.Volume == v.ID }) {
			v.OnRequest = true
		}
	}
	return nil
}

// checkConsumer names the field that is wrong.
func (c *Config) checkConsumer(i int) (field string, err error) {
	one := c.KeySocket.Consumers[i]
	v, ok := c.Volume(one.Volume)
	switch {
	case !ok:
		return "volume", fmt.Errorf("there is no volume %q", one.Volume)
	case slices.Contains(c.lines, one.Volume):
		return "volume", errors.New("its line of crypttab has the option keyagent, so that the agent maps it")
	case v.Kind != Data:
		return "volume", fmt.Errorf("%q is of the kind %s, whose key nobody knows", v.ID, v.Kind)
	case v.Integrity != "":
		return "volume", fmt.Errorf("%q has integrity, which the agent alone maps: an option keyagent in its line of crypttab", v.ID)
	case v.Mount != "":
		return "volume", fmt.Errorf("%q has a mount, and systemd maps and mounts it: a line of fstab", v.ID)
	case v.Optional:
		return "volume", fmt.Errorf("%q is optional, which is systemd's to say: nofail in crypttab", v.ID)
	case !unitName.MatchString(one.Unit):
		return "unit", errors.New("must be the exact name of a service, such as systemd-cryptsetup@data.service")
	case one.Credential == "" && len(v.Name) > maxMappingCall:
		return "volume", fmt.Errorf("%q has a name of more than %d bytes, for which systemd cannot call", v.ID, maxMappingCall)
	case one.Credential != "" && !credentialID.MatchString(one.Credential):
		return "credential", errors.New("must be at most 80 letters, digits, dots, colons, dashes or underscores")
	case len(one.Unit)+len(one.Credential) > maxCredentialCall && one.Credential != "":
		return "credential", fmt.Errorf("unit and credential have more than %d bytes, for which systemd cannot call", maxCredentialCall)
	}
	// What the call names must be one thing, or the order of the list would decide.
	j := slices.IndexFunc(c.KeySocket.Consumers[:i], func(o Consumer) bool {
		return o.Credential == one.Credential && (o.Unit == one.Unit && one.Credential != "" || o.Volume == one.Volume && o.Unit == one.Unit)
	})
	if j >= 0 {
		return "unit", fmt.Errorf("consumers[%d] says the same", j)
	}
	return "", nil
}

// HandedOut are the IDs of volumes that systemd maps.
func (c *Config) HandedOut() []string {
	var out []string
	for _, one := range c.KeySocket.Consumers {
		if !slices.Contains(out, one.Volume) {
			out = append(out, one.Volume)
		}
	}
	return out
}
