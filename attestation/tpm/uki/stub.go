package uki

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// The stubs that are modelled, by systemd's major version. What an older or a
// newer one measures is not known here, and never guessed.
const (
	oldestStub = 252
	newestStub = 262
)

// directStart is the first version whose stub starts the kernel itself. Before,
// it handed the kernel to the firmware's LoadImage, which measures it.
const directStart = 258

// profiles is the first version that knows images of several profiles.
const profiles = 257

// measured are the sections that stubs measure into PCR 11, in their order, and
// the first version that does. Sources: systemd-stub(7), the news of each version,
// and the list of names in the stubs themselves.
var measured = []struct {
	section string
	since   int
}{
	{".linux", 252}, {".osrel", 252}, {".cmdline", 252}, {".initrd", 252},
	{".ucode", 256}, {".splash", 252}, {".dtb", 252}, {".uname", 254}, {".sbat", 254},
	{".pcrpkey", 252}, {".profile", profiles}, {".dtbauto", 257}, {".hwids", 257}, {".efifw", 258},
}

// choices are sections of which an image may have several, and of which the stub
// uses, and measures, the first that fits the machine, or none.
var choices = []string{".dtbauto", ".efifw"}

// unmeasured are sections of a UKI that its stub does not measure: its own code
// and data, and the signature of the value of PCR 11 itself.
var unmeasured = []string{
	".text", ".rodata", ".rdata", ".data", ".bss", ".reloc", ".sdmagic", ".compat", ".pcrsig",
	".dynamic", ".dynsym", ".dynstr", ".rela", ".eh_frame", ".hash", ".gnu", ".note", ".init", ".comment",
}

// knownSection reports whether it is clear what a stub does with a section. One
// whose name does not begin with a dot is none of the stub's.
func knownSection(name string) bool {
	if !strings.HasPrefix(name, ".") {
		return true
	}
	for _, m := range measured {
		if m.section == name {
			return true
		}
	}
	// A name in a PE file is cut after eight characters, and compilers add to it.
	return slices.ContainsFunc(unmeasured, func(known string) bool {
		return name == known || strings.HasPrefix(name, known+".") || len(name) == 8 && strings.HasPrefix(known, name)
	})
}

// stubVersion reads systemd's major version from a stub's .sdmagic.
func stubVersion(stub string) (int, error) {
	version, ok := strings.CutPrefix(stub, "systemd-stub ")
	if !ok {
		return 0, fmt.Errorf("%w: the stub calls itself %q, which is not systemd's", ErrNotModelled, stub)
	}
	version = strings.TrimPrefix(version, "v")
	end := strings.IndexFunc(version, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(version)
	}
	major, err := strconv.Atoi(version[:end])
	rest := version[end:]
	switch {
	case err != nil:
		return 0, fmt.Errorf("%w: stub %q has no version", ErrNotModelled, stub)
	case strings.HasPrefix(rest, "~rc"), strings.HasPrefix(rest, "~devel"), strings.HasPrefix(rest, "-rc"):
		return 0, fmt.Errorf("%w: stub %q is of a version that was under way", ErrNotModelled, stub)
	case major < oldestStub || major > newestStub:
		return 0, fmt.Errorf("%w: stub %q; versions %d to %d are", ErrNotModelled, stub, oldestStub, newestStub)
	}
	return major, nil
}
