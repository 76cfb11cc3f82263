package node

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/pattern"
)

// Kind is what a volume is for.
type Kind string

// The kinds. Swap and scratch volumes have a key that the kernel makes and that
// nobody ever sees: what is on them ends with the machine's run.
const (
	Data    Kind = "data"
	Swap    Kind = "swap"
	Scratch Kind = "scratch"
)

// Volume is one volume of this machine, wherever its description comes from.
type Volume struct {
	ID     string `yaml:"id"`
	Kind   Kind   `yaml:"kind,omitempty"` // zero: Data
	Device string `yaml:"device"`         // absolute path, or UUID=, PARTUUID=, LABEL= or PARTLABEL= and a value
	Name   string `yaml:"name,omitempty"` // of the mapping; zero: the ID
	// Filesystem is ext4, xfs, btrfs or none; zero: none.
	Filesystem string   `yaml:"filesystem,omitempty"`
	Label      string   `yaml:"label,omitempty"`   // of the filesystem, when it is made
	Mount      string   `yaml:"mount,omitempty"`   // absolute path; zero: nowhere
	Options    []string `yaml:"options,omitempty"` // of the mount, as mount(8) knows them; nil: nosuid, nodev
	// From is what a new volume begins with, in place of an empty filesystem. Nil: nothing.
	From *Image `yaml:"from,omitempty"`
	// Source is the volume of which the disk is a clone, or a restored snapshot, as long as
	// this volume does not exist: it is created with that data. Empty: the disk is blank.
	Source string `yaml:"source,omitempty"`
	// Format is explicit intent: create the volume if it does not exist.
	Format   bool `yaml:"format,omitempty"`
	ReadOnly bool `yaml:"read_only,omitempty"`
	Discards bool `yaml:"discards,omitempty"` // pass TRIM on, which tells the host what is unused
	Optional bool `yaml:"optional,omitempty"` // the node is ready without it
	// OnRequest leaves the volume closed until somebody asks for it.
	OnRequest bool `yaml:"on_request,omitempty"`
	// NoMMP leaves out ext4's protection against a second mount when the filesystem is
	// made. With it an opening after a crash takes eleven seconds or more; the lease
	// protects without it, too, and so does a disk's reservation.
	NoMMP bool `yaml:"no_mmp,omitempty"`
	// Measure writes into a register of the machine that the volume was opened, so that
	// later evidence shows it.
	Measure bool `yaml:"measure,omitempty"`
	// Integrity authenticates what is on the volume: one of [Integrities], or empty. A volume that
	// was made without is not opened.
	Integrity string `yaml:"integrity,omitempty"`
	// NoJournal has a volume with integrity write data and tags in place.
	NoJournal bool `yaml:"no_journal,omitempty"`
	// OnRevoke is what becomes of the open volume when the key service refuses this machine, or
	// was not reached, for longer than Grace says. Empty: suspend, and keep for a volume that
	// the initrd opened.
	OnRevoke OnRevoke `yaml:"on_revoke,omitempty"`
	Grace    Grace    `yaml:"grace,omitempty"`
	// Offline is for how long, and how many boots, the key is kept for an outage of the key
	// service, if that allows it. Nil: it is not kept.
	Offline *policy.Offline `yaml:"offline,omitempty"`
	// After names volumes that are opened before this one.
	After []string `yaml:"after,omitempty"`
}

// OnRevoke is what becomes of an open volume that this machine may not have any more.
type OnRevoke string

// What there is.
const (
	Keep    OnRevoke = "keep"    // it stays, with a warning
	Suspend OnRevoke = "suspend" // its key is taken from the kernel, and its I/O waits for a better verdict
	Shut    OnRevoke = "close"   // it is unmounted and closed, or suspended if something uses it
)

// Grace is how long an open volume stays as it is.
type Grace struct {
	// Refused is for a machine that the policy does not know any more; empty: 1h. What an
	// operator revoked by name has none.
	Refused string `yaml:"refused,omitempty"`
	// Unreachable is for a key service that gives no verdict; empty or "none": without end.
	Unreachable string `yaml:"unreachable,omitempty"`
}

// defaultRefused leaves time to mend a policy that was wrong.
const defaultRefused = time.Hour

// Limits are the two as durations, of which zero is none, and for Unreachable without end.
// It errs where Validate does.
func (g Grace) Limits() (refused, unreachable time.Duration, err error) {
	refused = defaultRefused
	for _, f := range []struct {
		text string
		to   *time.Duration
	}{{g.Refused, &refused}, {g.Unreachable, &unreachable}} {
		switch f.text {
		case "":
			continue
		case "none":
			*f.to = 0
			continue
		}
		d, err := time.ParseDuration(f.text)
		if err != nil || d < time.Second {
			return 0, 0, errors.New("must be a duration of a second or more, such as 10m, or none")
		}
		*f.to = d
	}
	return refused, unreachable, nil
}

// Image is copied into a new volume. It is proved by one of the two.
type Image struct {
	Path     string `yaml:"path"`                // of a file or a block device, absolute
	SHA256   string `yaml:"sha256,omitempty"`    // of all of it, lower-case hex
	RootHash string `yaml:"root_hash,omitempty"` // of the dm-verity mapping at Path, lower-case hex
}

// FieldError names the field of a volume that is wrong. It wraps [ErrVolume].
type FieldError struct {
	Field string // as the configuration file calls it
	Index int    // in a list, else -1
	Err   error
}

func (e *FieldError) Error() string { return fmt.Sprintf("%s: %v", e.Field, e.Err) }

func (e *FieldError) Unwrap() []error { return []error{ErrVolume, e.Err} }

// ErrVolume means that the description of a volume is wrong.
var ErrVolume = errors.New("volume is not described correctly")

// maxName is the longest name of a mapping: the kernel bounds the identifier that
// it is part of.
const maxName = 80

var mappingName = pattern.New(fmt.Sprintf(`^[A-Za-z0-9][A-Za-z0-9._-]{0,%d}$`, maxName-1))

// Filesystems are those that can be made.
var Filesystems = []string{"ext4", "xfs", "btrfs"}

// labelSizes bound a label in bytes.
var labelSizes = map[string]int{"ext4": 16, "xfs": 12, "btrfs": 255}

// Validate checks a volume and fills in what was left out. Its errors are
// [*FieldError].
func (v *Volume) Validate() error {
	if v.Kind == "" {
		v.Kind = Data
	}
	if v.Name == "" {
		v.Name = v.ID
	}
	if v.Filesystem == "" {
		v.Filesystem = "none"
	}
	if v.Options == nil {
		v.Options = []string{"nosuid", "nodev"}
	}
	for _, c := range []struct {
		field string
		check func() error
	}{
		{"id", v.checkID}, {"kind", v.checkKind}, {"name", v.checkName}, {"device", v.checkDevice}, {"filesystem", v.checkFilesystem},
		{"label", v.checkLabel}, {"mount", v.checkMount}, {"from", v.checkFrom}, {"source", v.checkSource}, {"integrity", v.checkIntegrity}, {"read_only", v.checkReadOnly},
		{"on_revoke", v.checkOnRevoke}, {"offline", v.checkOffline}, {"grace", func() error { _, _, err := v.Grace.Limits(); return err }},
	} {
		if err := c.check(); err != nil {
			return &FieldError{c.field, -1, err}
		}
	}
	for i, o := range v.Options {
		if err := CheckOption(o); err != nil {
			return &FieldError{"options", i, err}
		}
	}
	for i, id := range v.After {
		if !policy.ValidVolume(id) || id == v.ID {
			return &FieldError{"after", i, errors.New("must be the ID of another volume")}
		}
	}
	return nil
}

func (v *Volume) checkID() error {
	if !policy.ValidVolume(v.ID) {
		return errors.New("must be 1 to 128 letters, digits, dots, dashes or underscores")
	}
	return nil
}

func (v *Volume) checkKind() error {
	switch v.Kind {
	case Data:
		return nil
	case Swap:
		if v.Mount != "" || v.Filesystem != "none" {
			return errors.New("a swap area has no filesystem and no mount point")
		}
	case Scratch:
	default:
		return fmt.Errorf("%.40q is not a kind: data, swap or scratch", v.Kind)
	}
	if !v.Format {
		return errors.New("needs format: true, since everything on the device is overwritten at each start")
	}
	if v.ReadOnly {
		return errors.New("cannot be read-only: it begins empty")
	}
	if v.Measure {
		return errors.New("cannot be measured: its key is another one at each start")
	}
	return nil
}

func (v *Volume) checkOnRevoke() error {
	switch v.OnRevoke {
	case "", Keep, Suspend, Shut:
	default:
		return fmt.Errorf("%.40q is none of keep, suspend and close", v.OnRevoke)
	}
	if v.Throwaway() && (v.OnRevoke != "" || v.Grace != Grace{}) {
		return errors.New("the key of this volume does not come from a key service")
	}
	return nil
}

func (v *Volume) checkOffline() error {
	switch {
	case v.Offline == nil:
		return nil
	case v.Throwaway():
		return errors.New("the key of this volume does not come from a key service")
	case v.ReadOnly:
		return errors.New("is for a volume that is written: only a writer's lease keeps others away meanwhile")
	}
	_, err := v.Offline.Limits()
	return err
}

func (v *Volume) checkName() error {
	if !mappingName.MatchString(v.Name) {
		return fmt.Errorf("must be 1 to %d letters, digits, dots, dashes or underscores", maxName)
	}
	if v.Name == "control" {
		return errors.New("is the device-mapper's own")
	}
	for _, taken := range []string{"_dif", "_prf"} {
		if strings.HasSuffix(v.Name, taken) {
			return fmt.Errorf("must not end in %s, as the mappings below a volume with integrity do", taken)
		}
	}
	return nil
}

// deviceTags are the ways to name a device other than by a path, and where udev
// keeps the links for them.
var deviceTags = map[string]string{
	"UUID": "/dev/disk/by-uuid", "PARTUUID": "/dev/disk/by-partuuid",
	"LABEL": "/dev/disk/by-label", "PARTLABEL": "/dev/disk/by-partlabel",
}

// tagFolders hold links by what a disk and its clones have in common.
var tagFolders = []string{"/dev/disk/by-uuid", "/dev/disk/by-partuuid", "/dev/disk/by-label", "/dev/disk/by-partlabel"}

func (v *Volume) checkDevice() error {
	tag, value, tagged := strings.Cut(v.Device, "=")
	if dir := deviceTags[tag]; tagged && dir != "" {
		if value == "" || len(value) > 255 || strings.ContainsAny(value, "/\x00") || value == "." || value == ".." {
			return fmt.Errorf("%s= needs a value without slashes", tag)
		}
		return nil
	}
	switch {
	case !filepath.IsAbs(v.Device) || strings.ContainsRune(v.Device, 0) || len(v.Device) > 4096:
		return errors.New("must be an absolute path, or UUID=, PARTUUID=, LABEL= or PARTLABEL= and a value")
	case filepath.Clean(v.Device) != v.Device:
		return fmt.Errorf("must be a plain path: %s", filepath.Clean(v.Device))
	}
	return nil
}

// DevicePath is where the device is, or will be: udev's link for a tag.
func (v *Volume) DevicePath() string {
	tag, value, tagged := strings.Cut(v.Device, "=")
	if dir := deviceTags[tag]; tagged && dir != "" {
		return filepath.Join(dir, escapeUdev(value))
	}
	return v.Device
}

// escapeUdev writes a value as udev does in names of links: what is not plain
// becomes \xNN.
func escapeUdev(value string) string {
	var out strings.Builder
	for i := range len(value) {
		b := value[i]
		if b >= 0x80 || b >= '0' && b <= '9' || b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || strings.ContainsRune("#+-.:=@_", rune(b)) {
			out.WriteByte(b)
			continue
		}
		fmt.Fprintf(&out, `\x%02x`, b)
	}
	return out.String()
}

func (v *Volume) checkFilesystem() error {
	if v.Filesystem != "none" && !slices.Contains(Filesystems, v.Filesystem) {
		return fmt.Errorf("%.40q is not supported: %s, or none", v.Filesystem, strings.Join(Filesystems, ", "))
	}
	return nil
}

func (v *Volume) checkLabel() error {
	if v.Label == "" {
		return nil
	}
	limit := labelSizes[v.Filesystem]
	if limit == 0 {
		return errors.New("needs a filesystem")
	}
	if len(v.Label) > limit || strings.ContainsFunc(v.Label, func(r rune) bool { return r < ' ' || r == '/' || r == 0x7f }) || v.Label[0] == '-' {
		return fmt.Errorf("must be at most %d bytes for %s, without slashes and control characters", limit, v.Filesystem)
	}
	return nil
}

func (v *Volume) checkMount() error {
	if v.Mount == "" {
		return nil
	}
	if !filepath.IsAbs(v.Mount) || filepath.Clean(v.Mount) == "/" || strings.ContainsRune(v.Mount, 0) || len(v.Mount) > 4000 {
		return errors.New("must be an absolute path other than /")
	}
	if v.Filesystem == "none" {
		return fmt.Errorf("needs a filesystem: %s", strings.Join(Filesystems, ", "))
	}
	v.Mount = filepath.Clean(v.Mount)
	return nil
}

var (
	sha256Hex = pattern.New(`^[0-9a-f]{64}$`)
	rootHash  = pattern.New(`^[0-9a-f]{64}([0-9a-f]{64})?$`)
)

func (v *Volume) checkFrom() error {
	f := v.From
	switch {
	case f == nil:
	case !filepath.IsAbs(f.Path) || strings.ContainsRune(f.Path, 0) || len(f.Path) > 4096:
		return errors.New("path must be absolute")
	case (f.SHA256 == "") == (f.RootHash == ""):
		return errors.New("needs sha256 or root_hash, one of them: the image lies where others may write")
	case f.SHA256 != "" && !sha256Hex.MatchString(f.SHA256):
		return errors.New("sha256 must be 64 lower-case hex digits")
	case f.RootHash != "" && !rootHash.MatchString(f.RootHash):
		return errors.New("root_hash must be 64 or 128 lower-case hex digits")
	case v.Throwaway():
		return fmt.Errorf("a %s volume begins empty", v.Kind)
	case v.Filesystem == "btrfs":
		return errors.New("btrfs would take the image and its copy, which have one UUID, for one filesystem")
	case v.Label != "":
		return errors.New("the image has a label of its own: leave out label")
	case v.ReadOnly || slices.Contains(v.Options, "ro"):
		return errors.New("a volume that is created is written: leave out read_only")
	}
	return nil
}

func (v *Volume) checkSource() error {
	switch {
	case v.Source == "":
	case !policy.ValidVolume(v.Source) || v.Source == v.ID:
		return errors.New("must be the ID of another volume")
	case v.From != nil:
		return errors.New("a volume begins with an image or as a clone: leave out from, or source")
	case !filepath.IsAbs(v.Device), slices.ContainsFunc(tagFolders, func(dir string) bool { return strings.HasPrefix(v.Device, dir+"/") }):
		return errors.New("device must be the path of the disk: its tags are its source's as well")
	case v.Throwaway():
		return fmt.Errorf("a %s volume begins empty", v.Kind)
	case v.Filesystem == "btrfs":
		return errors.New("btrfs would take a volume and its clone, which have one UUID, for one filesystem")
	case v.Label != "":
		return errors.New("the clone has its source's label: leave out label")
	}
	return nil
}

// maxIntegrityName is the longest name of a mapping that has another one below it.
const maxIntegrityName = 76

// Integrities are the ways in which what is on a volume can be authenticated.
var Integrities = []string{"hmac-sha256", "aegis128"}

func (v *Volume) checkIntegrity() error {
	switch {
	case v.Integrity == "" || v.Integrity == "none":
		v.Integrity = ""
		if v.NoJournal {
			return errors.New("no_journal is for a volume with integrity")
		}
		return nil
	case !slices.Contains(Integrities, v.Integrity):
		return fmt.Errorf("%.40q is not supported: %s, or none", v.Integrity, strings.Join(Integrities, ", "))
	case v.Throwaway():
		return fmt.Errorf("a %s volume has none: its key ends with the machine's run", v.Kind)
	case v.Discards:
		return errors.New("a volume with integrity cannot pass TRIM on: leave out discards")
	case len(v.Name) > maxIntegrityName:
		return fmt.Errorf("the name of its mapping must be at most %d characters", maxIntegrityName)
	}
	return nil
}

func (v *Volume) checkReadOnly() error {
	if slices.Contains(v.Options, "ro") {
		v.ReadOnly = true // a read-only mount needs no writable mapping below it
	}
	if v.ReadOnly && v.Format {
		return errors.New("a volume that is created is written: leave out format")
	}
	if v.ReadOnly && v.Integrity != "" {
		return errors.New("a volume with integrity cannot be opened read-only: its journal is written even then")
	}
	return nil
}

// Throwaway reports whether the key of the volume ends with its mapping.
func (v *Volume) Throwaway() bool { return v.Kind == Swap || v.Kind == Scratch }

// CheckVolumes checks what volumes are to each other: nothing is named twice, no
// volume waits for itself or for one that comes on request alone, and what they come
// after exists. The error names the
// volume by its place.
func CheckVolumes(all []Volume) (int, error) {
	type use struct{ field, value string }
	seen := map[use]bool{}
	for i := range all {
		v := &all[i]
		for _, u := range []use{{"id", v.ID}, {"name", v.Name}, {"device", v.DevicePath()}, {"mount", v.Mount}} {
			if u.value != "" && seen[u] {
				return i, &FieldError{u.field, -1, fmt.Errorf("%q is used twice", u.value)}
			}
			seen[u] = true
		}
	}
	for i := range all {
		for n, id := range all[i].After {
			if !slices.ContainsFunc(all, func(v Volume) bool { return v.ID == id }) {
				return i, &FieldError{"after", n, fmt.Errorf("there is no volume %q", id)}
			}
		}
	}
	for i := range all {
		for _, id := range Needs(all, &all[i]) {
			n := slices.IndexFunc(all, func(v Volume) bool { return v.ID == id })
			if all[n].OnRequest && !all[i].OnRequest {
				return i, &FieldError{"on_request", -1, fmt.Errorf("it needs volume %q, which is opened on request alone", id)}
			}
		}
	}
	if _, stuck := Order(all); stuck >= 0 {
		return stuck, &FieldError{"after", -1, errors.New("the volume waits for itself, by way of others")}
	}
	return 0, nil
}
