package node

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/crypttab"
)

// ofLine returns the volume that a line of crypttab describes.
func ofLine(l *crypttab.Line) (Volume, error) {
	v := Volume{ID: l.ID(), Name: l.Name, Device: l.Device}
	if err := checkLine(l); err != nil {
		return v, err
	}
	seen := map[string]bool{}
	for _, o := range l.Options {
		if seen[o.Name] && !strings.HasPrefix(o.Name, "x-") {
			return v, fmt.Errorf("the option %.40q stands in it twice", o.Name)
		}
		seen[o.Name] = true
		if err := v.apply(o); err != nil {
			return v, err
		}
	}
	return v, v.Validate()
}

func checkLine(l *crypttab.Line) error {
	switch {
	case l.More:
		return errors.New("it has more than four fields")
	case l.Key != "-" && l.Key != "none":
		return errors.New("the third field must be none: the key comes from the key service")
	case !l.Has("_netdev"):
		return errors.New("it needs the option _netdev: the key comes over the network, which is there later than local disks")
	}
	return nil
}

// apply does to the volume what an option of crypttab says.
func (v *Volume) apply(o crypttab.Option) error {
	flag := true // options that have no value
	if (o.Name == "swap" || o.Name == "tmp" || o.Name == "keyagent-format") && (v.Kind != "" || v.Format) {
		return errors.New("swap, tmp and keyagent-format exclude each other")
	}
	switch o.Name {
	case "keyagent":
		if o.HasValue && o.Value == "" {
			return errors.New("keyagent= names no volume")
		}
		flag = false
	case "keyagent-format":
		v.Format, v.Filesystem, flag = true, o.Value, false
		if o.HasValue && o.Value == "" {
			return errors.New("keyagent-format= names no filesystem")
		}
	case "keyagent-from", "keyagent-sha256", "keyagent-root-hash":
		if o.Value == "" {
			return fmt.Errorf("%s= has no value", o.Name)
		}
		if v.From == nil {
			v.From = &Image{}
		}
		*map[string]*string{"keyagent-from": &v.From.Path, "keyagent-sha256": &v.From.SHA256, "keyagent-root-hash": &v.From.RootHash}[o.Name] = o.Value
		flag = false
	case "keyagent-source":
		if o.Value == "" {
			return errors.New("keyagent-source= names no volume")
		}
		v.Source, flag = o.Value, false
	case "keyagent-no-mmp":
		v.NoMMP = true
	case "keyagent-integrity":
		v.Integrity, flag = cmp.Or(o.Value, "hmac-sha256"), false
	case "keyagent-on-revoke":
		v.OnRevoke, flag = OnRevoke(o.Value), false
	case "keyagent-grace-refused":
		v.Grace.Refused, flag = o.Value, false
	case "keyagent-grace-unreachable":
		v.Grace.Unreachable, flag = o.Value, false
	case "keyagent-offline-for", "keyagent-offline-boots":
		if v.Offline == nil {
			v.Offline = &policy.Offline{}
		}
		flag = false
		if o.Name == "keyagent-offline-for" {
			v.Offline.For = o.Value
			break
		}
		var err error
		if v.Offline.Boots, err = strconv.Atoi(o.Value); err != nil {
			return errors.New("keyagent-offline-boots= must be a number")
		}
	case "keyagent-no-journal":
		v.NoJournal = true
	case "keyagent-measure":
		v.Measure = true
	case "readonly", "read-only":
		v.ReadOnly = true
	case "discard", "allow-discards":
		v.Discards = true
	case "swap":
		v.Kind, v.Format = Swap, true
	case "tmp":
		v.Kind, v.Format, v.Filesystem, flag = Scratch, true, "ext4", false
		if o.Value != "" {
			v.Filesystem = o.Value
		}
	case "nofail":
		v.Optional = true
	case "noauto":
		v.OnRequest = true
	case "_netdev", "luks", "auto", "fail":
	case "headless", "timeout", "tries", "x-initrd.attach":
		flag = false // they are about a passphrase, which nobody asks for, or about the initrd
	default:
		if !strings.HasPrefix(o.Name, "x-") {
			return fmt.Errorf("the option %.40q is not one that keyagent knows", o.Name)
		}
		flag = false
	}
	if flag && o.HasValue {
		return fmt.Errorf("the option %.40q takes no value", o.Name)
	}
	return nil
}

// addCrypttab adds the volumes that lines of crypttab describe; a file that is not there
// has none, as for systemd. The first line that is wrong is an error: the machine would
// come up without its volume, or in another order.
func (c *Config) addCrypttab(path string) error {
	data, err := config.ReadPublicFile(path, crypttab.MaxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, l := range crypttab.Parse(data) {
		v, err := ofLine(&l)
		if err != nil {
			return fmt.Errorf("%s, line %d, %.80q: %w", path, l.Number, l.Name, err)
		}
		c.Volumes, c.lines = append(c.Volumes, v), append(c.lines, v.ID)
	}
	return nil
}
