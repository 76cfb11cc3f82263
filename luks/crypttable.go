package luks

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// The one table that each kind of mapping of this package has, in writing and in
// reading.

// The optional parameters that a table of ours may have. Each maps to what it
// means for the Mapping.
const (
	optSectorSize  = "sector_size:4096"
	optDiscards    = "allow_discards"
	optNoReadQueue = "no_read_workqueue"
	optNoWriteQ    = "no_write_workqueue"
	optTags        = "integrity:32:aead"

	cryptKind = "crypt"
)

// volumeKeyRef names the volume key in the kernel's keyring, as libcryptsetup does.
func (f *form) volumeKeyRef(uuid string) string {
	return fmt.Sprintf(":%d:logon:%s", f.keySize, volumeKeyName(uuid))
}

func volumeKeyName(uuid string) string { return "cryptsetup:" + uuid + "-d0" }

// cryptParams is a crypt target in the words of the kernel.
func cryptParams(f *form, keyRef string, dev DevNum, offset int64, opts OpenOptions) string {
	options := []string{optSectorSize}
	if f.tagged() {
		options = append(options, optTags)
	}
	if opts.AllowDiscards {
		options = append(options, optDiscards)
	}
	if !opts.Workqueues {
		options = append(options, optNoReadQueue, optNoWriteQ)
	}
	return fmt.Sprintf("%s %s 0 %v %d %d %s", f.cipher, keyRef, dev, offset/sectorSize, len(options), strings.Join(options, " "))
}

// checkTable holds a live mapping against the one table that a volume of this
// package has, and returns what it maps. Anything that is not expected is a
// mismatch; there is no option that is let through unread.
func checkTable(m liveMapping, name, uuid string) (Mapping, error) {
	as := Mapping{Name: name, UUID: uuid}
	if m.tags == nil {
		return checkCrypt(m, as, plain, plain.volumeKeyRef(uuid), dataOffset)
	}
	f := authenticated
	if len(m.table) > 0 {
		f = cmp.Or(taggedForm(m.table[0].params), f)
	}
	as.Integrity = f.integrity
	as, err := checkCrypt(m, as, f, f.volumeKeyRef(uuid), 0)
	if err != nil {
		return Mapping{}, err
	}
	if as.DataDevice != m.tags.dev {
		return Mapping{}, fmt.Errorf("%w: %s lies on device %v, and its tags on %v", ErrTableMismatch, name, as.DataDevice, m.tags.dev)
	}
	dev, journal, err := checkTags(*m.tags, name, uuid)
	if err != nil {
		return Mapping{}, err
	}
	if m.tags.suspended && !m.suspended {
		return Mapping{}, fmt.Errorf("%w: %s is not suspended, and its tags are", ErrTableMismatch, name)
	}
	as.DataDevice, as.NoJournal = dev, !journal
	return as, nil
}

func checkCrypt(m liveMapping, as Mapping, f *form, keyRef string, offset int64) (Mapping, error) {
	wrong := func(format string, args ...any) (Mapping, error) {
		return Mapping{}, fmt.Errorf("%w: %s: %s", ErrTableMismatch, as.Name, fmt.Sprintf(format, args...))
	}
	if len(m.table) != 1 {
		return wrong("it has %d targets in force, expected is 1", len(m.table))
	}
	target := m.table[0]
	if target.kind != cryptKind || target.start != 0 {
		return wrong("target is %q at sector %d, expected is crypt at 0", target.kind, target.start)
	}
	fields := strings.Fields(target.params)
	if len(fields) < 5 {
		return wrong("it has %d fields", len(fields))
	}
	if fields[0] != f.cipher {
		return wrong("cipher is %q, expected is %q", fields[0], f.cipher)
	}
	// A key that is not a keyring reference would be the volume key itself: it
	// is compared, and never printed. A suspended mapping has random bytes in its
	// place, which Resume replaces.
	if fields[1] != keyRef && !m.suspended {
		return wrong("key does not come from the kernel keyring as %q", keyRef)
	}
	if fields[2] != "0" {
		return wrong("IV offset is %q, expected is 0", fields[2])
	}
	dev, err := parseDevNum(fields[3])
	if err != nil {
		return wrong("data device is %q", fields[3])
	}
	if fields[4] != fmt.Sprint(offset/sectorSize) {
		return wrong("data offset is %s sectors, expected is %d", fields[4], offset/sectorSize)
	}
	var options []string
	if len(fields) > 5 {
		options = fields[6:]
		if fields[5] != fmt.Sprint(len(options)) {
			return wrong("it counts %s options and has %d", fields[5], len(options))
		}
	}
	known := []string{optSectorSize, optDiscards, optNoReadQueue, optNoWriteQ}
	if f.tagged() {
		known = []string{optSectorSize, optTags}
	}
	for i, o := range options {
		if !slices.Contains(known, o) || slices.Contains(options[:i], o) {
			return wrong("option %q is not expected", o)
		}
	}
	if !slices.Contains(options, optSectorSize) {
		return wrong("sector size is not %d", dataSectorSize)
	}
	if f.tagged() && !slices.Contains(options, optTags) {
		return wrong("it verifies no tags")
	}
	as.Path, as.Device, as.DataDevice = mapperPath(as.Name), m.dev, dev
	as.Bytes = int64(target.length) * sectorSize
	as.ReadOnly, as.Suspended, as.InUse = m.readOnly, m.suspended, m.open > 0
	as.Discards = slices.Contains(options, optDiscards)
	as.Workqueues = !slices.Contains(options, optNoReadQueue) && !slices.Contains(options, optNoWriteQ)
	return as, nil
}

func parseDevNum(text string) (dev DevNum, err error) {
	if n, err := fmt.Sscanf(text, "%d:%d", &dev.Major, &dev.Minor); n != 2 || err != nil || dev.String() != text {
		return DevNum{}, fmt.Errorf("%w: %q is no device number", ErrTableMismatch, text)
	}
	return dev, nil
}

func mapperPath(name string) string { return "/dev/mapper/" + name }

// options are those that a mapping was made with.
func (m Mapping) options() OpenOptions {
	return OpenOptions{ReadOnly: m.ReadOnly, AllowDiscards: m.Discards, Workqueues: m.Workqueues, NoJournal: m.NoJournal}
}
