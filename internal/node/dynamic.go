package node

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/failure"
)

// Dynamic allows volumes that no file names: which caller may open which IDs on
// which devices. What is not named is refused.
type Dynamic struct {
	UIDs    []uint32 `yaml:"uids"`
	Volumes []string `yaml:"volumes"` // patterns of IDs, * stands for any run of characters
	// Devices are patterns of absolute paths, as path.Match knows them: * does not
	// cross a slash.
	Devices []string `yaml:"devices"`
	// Mounts are patterns of mount points. Empty: the volumes are not mounted.
	Mounts []string `yaml:"mounts,omitempty"`
	// Filesystems that a caller may ask for beside the default.
	Filesystems []string `yaml:"filesystems,omitempty"`
	Format      bool     `yaml:"format,omitempty"` // may create volumes
	// Filesystem, Options and Discards are the defaults.
	Filesystem string   `yaml:"filesystem,omitempty"`
	Options    []string `yaml:"options,omitempty"`
	Discards   bool     `yaml:"discards,omitempty"`
	// Integrity is what each volume must have; empty: what the caller says.
	Integrity string `yaml:"integrity,omitempty"`
	NoJournal bool   `yaml:"no_journal,omitempty"` // of volumes with integrity
	// OnRevoke and Grace are those of each volume, see [Volume].
	OnRevoke OnRevoke `yaml:"on_revoke,omitempty"`
	Grace    Grace    `yaml:"grace,omitempty"`
}

// check names the field that is wrong.
func (d *Dynamic) check() error {
	for _, c := range []struct {
		field string
		wrong bool
		why   string
	}{
		{"uids", len(d.UIDs) == 0, "empty: no caller could use it"},
		{"volumes", len(d.Volumes) == 0, "empty: no volume could be opened"},
		{"devices", len(d.Devices) == 0, "empty: no device could be opened"},
	} {
		if c.wrong {
			return &FieldError{c.field, -1, errors.New(c.why)}
		}
	}
	for field, patterns := range map[string][]string{"devices": d.Devices, "mounts": d.Mounts} {
		for i, p := range patterns {
			if _, err := path.Match(p, ""); err != nil || !path.IsAbs(p) {
				return &FieldError{field, i, errors.New("must be an absolute path, in which * stands for any run of characters but slashes")}
			}
		}
	}
	for i, f := range append([]string{d.Filesystem}, d.Filesystems...) {
		if f != "" && f != "none" && !slices.Contains(Filesystems, f) {
			return &FieldError{"filesystems", i - 1, errors.New("must be of ext4, xfs, btrfs and none")}
		}
	}
	if d.Integrity != "" && d.Integrity != "none" && !slices.Contains(Integrities, d.Integrity) {
		return &FieldError{"integrity", -1, fmt.Errorf("must be of %s and none", strings.Join(Integrities, ", "))}
	}
	v := Volume{OnRevoke: d.OnRevoke, Grace: d.Grace}
	if err := v.checkOnRevoke(); err != nil {
		return &FieldError{"on_revoke", -1, err}
	}
	if _, _, err := d.Grace.Limits(); err != nil {
		return &FieldError{"grace", -1, err}
	}
	for i, o := range d.Options {
		if err := CheckOption(o); err != nil {
			return &FieldError{"options", i, err}
		}
	}
	return nil
}

// ErrNotAllowed means that no rule for dynamic volumes covers a request.
var ErrNotAllowed = failure.New(failure.PolicyDenied, errors.New("no rule for dynamic volumes allows it"), "dynamic in the agent's configuration says which volumes a caller may describe")

// Admit completes the volume that a caller describes with the defaults of the first
// rule that allows it, and validates it. v.Format is whether the caller wants to
// create it.
func (c *Config) Admit(uid uint32, v Volume) (Volume, error) {
	if !policy.ValidVolume(v.ID) {
		return v, failure.New(failure.Usage, v.Validate(), "")
	}
	for i := range c.Dynamic {
		d := &c.Dynamic[i]
		if full, ok := d.admit(uid, v); ok {
			if err := full.Validate(); err != nil {
				return v, failure.New(failure.Usage, err, "")
			}
			return full, c.collides(&full)
		}
	}
	return v, ErrNotAllowed
}

func (d *Dynamic) admit(uid uint32, v Volume) (Volume, bool) {
	if !slices.Contains(d.UIDs, uid) || !d.covers(v.ID) || v.Source != "" && !d.covers(v.Source) {
		return v, false
	}
	if v.Filesystem == "" {
		v.Filesystem = d.Filesystem
	} else if v.Filesystem != d.Filesystem && v.Filesystem != "none" && !slices.Contains(d.Filesystems, v.Filesystem) {
		return v, false
	}
	if v.Options == nil {
		v.Options = slices.Clone(d.Options)
	}
	for _, o := range v.Options {
		// What a caller's filesystem holds is the caller's: a rule has to say by name
		// that it may bring programs with other rights, or devices.
		if (o == "suid" || o == "dev") && !slices.Contains(d.Options, o) {
			return v, false
		}
	}
	v.Options = append([]string{"nosuid", "nodev"}, v.Options...)
	v.Discards = v.Discards && d.Discards
	if d.Integrity != "" && d.Integrity != "none" {
		v.Integrity = d.Integrity
	}
	v.OnRevoke, v.Grace = d.OnRevoke, d.Grace
	v.NoJournal = d.NoJournal && v.Integrity != "" && v.Integrity != "none"
	if v.Format && !d.Format || v.Throwaway() {
		return v, false
	}
	device := v.DevicePath()
	return v, path.Clean(device) == device && matchesAny(d.Devices, device) &&
		(v.Mount == "" || path.Clean(v.Mount) == v.Mount && matchesAny(d.Mounts, v.Mount))
}

func (d *Dynamic) covers(id string) bool {
	return slices.ContainsFunc(d.Volumes, func(p string) bool { return policy.Match(p, id) })
}

func matchesAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, name)
		return err == nil && ok
	})
}

// collides refuses a dynamic volume that takes something of a configured one.
func (c *Config) collides(v *Volume) error {
	for i := range c.Volumes {
		o := &c.Volumes[i]
		if o.ID == v.Source {
			return failure.Newf(failure.PolicyDenied, "only the configuration makes clones of its volumes", "the source %q is a configured volume", o.ID)
		}
		if o.ID == v.ID || o.Name == v.Name || o.DevicePath() == v.DevicePath() || v.Mount != "" && o.Mount == v.Mount {
			return failure.Newf(failure.PolicyDenied, "a configured volume is opened by its ID alone", "volume %q of the configuration has this ID, name, device or mount point", o.ID)
		}
	}
	return nil
}
