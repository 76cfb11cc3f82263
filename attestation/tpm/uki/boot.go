package uki

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"unicode/utf16"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/eventlog"
)

// kind of an EFI program.
type kind int

const (
	kindUKI kind = iota
	kindShim
	kindGRUB
	kindSystemdBoot
	kindKernel
)

// program is an EFI program as the firmware measures it.
type program struct {
	kind   kind
	name   string // for people
	digest []byte // Authenticode
	smbios bool   // measures SMBIOS tables
}

// Loader is an EFI program that is started before the kernel, or the kernel
// itself where no UKI has it.
type Loader struct {
	program
	version [2]int // of shim, GRUB or systemd-boot
	debian  bool   // GRUB's distribution
}

// OpenLoader reads shim, systemd-boot, GRUB or a Linux kernel at path.
func OpenLoader(path string) (*Loader, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	l, err := ParseLoader(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return l, nil
}

// What loaders say of their version.
const (
	shimVersion = `\$Version: (\d{1,4})(?:\.(\d{1,4}))? \$`
	grubVersion = `(?m)^grub,[^,\n]*,[^,\n]*,[^,\n]*,(\d{1,4})\.(\d{1,4})[,.~-]`
	bootVersion = `systemd-boot v?(\d{1,4})[.~ -]`
)

var errLoader = fmt.Errorf("%w: it is neither shim, systemd-boot, GRUB nor a Linux kernel", ErrNotModelled)

// ParseLoader tells programs apart by what they say of themselves: systemd-boot in
// .sdmagic, shim and GRUB in .sbat, Linux in its header.
func ParseLoader(data []byte) (*Loader, error) {
	sections, err := parseSections(data)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errLoader, err)
	}
	l := &Loader{}
	if l.digest, err = authenticodeDigest(data); err != nil {
		return nil, fmt.Errorf("%w: %w", errLoader, err)
	}
	sbat := find(sections, ".sbat")
	switch magic := find(sections, ".sdmagic"); {
	case bytes.Contains(magic, []byte("systemd-boot ")):
		l.kind, l.name = kindSystemdBoot, "systemd-boot"
		l.smbios = namesSMBIOS(sections)
		err = l.setVersion(bootVersion, magic)
	case magic != nil:
		return nil, fmt.Errorf("%w: .sdmagic is %.64q (hint: an image with a kernel in it goes by --uki)", errLoader, bytes.Trim(magic, "\x00# "))
	case hasLine(sbat, "shim,"):
		l.kind, l.name = kindShim, "shim"
		err = l.setVersion(shimVersion, data)
	case hasLine(sbat, "grub,"):
		l.kind, l.name = kindGRUB, "GRUB"
		l.debian = hasLine(sbat, "grub.debian,")
		err = l.setVersion(grubVersion, sbat)
	case len(data) > 0x206 && string(data[0x202:0x206]) == "HdrS":
		l.kind, l.name = kindKernel, "kernel"
	default:
		return nil, errLoader
	}
	return l, err
}

func (l *Loader) setVersion(pattern string, text []byte) error {
	m := regexp.MustCompile(pattern).FindSubmatch(text)
	if m == nil {
		return fmt.Errorf("%w: %s that does not say its version", ErrNotModelled, l.name)
	}
	for n, digits := range m[1:] {
		l.version[n], _ = strconv.Atoi(string(digits))
	}
	return nil
}

func hasLine(text []byte, prefix string) bool {
	for line := range bytes.Lines(text) {
		if bytes.HasPrefix(line, []byte(prefix)) {
			return true
		}
	}
	return false
}

// Boot is a way from the firmware to the kernel.
type Boot struct {
	Loaders    []*Loader // in the order in which they are started
	Image      *Image    // nil: the last loader is the kernel
	Profile    int       // of the image
	SecureBoot bool      // the firmware demands signatures
}

func (b *Boot) programs() []program {
	var out []program
	for _, l := range b.Loaders {
		out = append(out, l.program)
	}
	if b.Image != nil {
		out = append(out, b.Image.program)
	}
	return out
}

// smbiosEvent is how newer programs of systemd name the first SMBIOS structure that they
// measure: in UTF-16, among their constants. Seen are 262, which measures, and 252, 254 and
// 257, which do not.
var smbiosEvent = utf16z("smbios:type1")

func namesSMBIOS(code []section) bool {
	return slices.ContainsFunc(code, func(s section) bool {
		return (s.name == ".rodata" || s.name == ".data" || s.name == ".text") && bytes.Contains(s.data, smbiosEvent)
	})
}

// MeasuresSMBIOS reports that one of the programs measures the machine's SMBIOS tables into
// PCR 1. What is in them no file tells.
func (b *Boot) MeasuresSMBIOS() bool {
	return slices.ContainsFunc(b.programs(), func(p program) bool { return p.smbios })
}

// follows lists what may start what.
var follows = map[kind][]kind{
	kindShim:        {kindGRUB, kindSystemdBoot, kindUKI},
	kindGRUB:        {kindKernel},
	kindSystemdBoot: {kindKernel, kindUKI},
}

func (b *Boot) check() error {
	chain := b.programs()
	if len(chain) == 0 {
		return fmt.Errorf("%w: nothing is started", ErrNotModelled)
	}
	for n, p := range chain[1:] {
		if !slices.Contains(follows[chain[n].kind], p.kind) {
			return fmt.Errorf("%w: %s that starts %s", ErrNotModelled, chain[n].name, p.name)
		}
	}
	if last := chain[len(chain)-1]; last.kind != kindKernel && last.kind != kindUKI {
		return fmt.Errorf("%w: %s without what it starts (hint: --uki, or the kernel as the last --loader)", ErrNotModelled, last.name)
	}
	if b.Image != nil {
		return b.Image.checkProfile(b.Profile)
	}
	return nil
}

// PCR4 predicts the boot applications: the programs in their order, and the kernel
// in the UKI where its stub hands that to the firmware.
func (b *Boot) PCR4() (Prediction, error) {
	p := newPrediction()
	if err := b.check(); err != nil {
		return p, err
	}
	const action = "Calling EFI Application from Boot Option"
	sum := sha256.Sum256([]byte(action))
	p.extend(attestation.Event{Type: "EV_EFI_ACTION", Name: action}, sum[:])
	separator := sha256.Sum256(make([]byte, 4))
	p.extend(attestation.Event{Type: "EV_SEPARATOR", Name: "separator"}, separator[:])
	chain := b.programs()
	for _, prog := range chain[:len(chain)-1] {
		p.extend(application(prog.name), prog.digest)
	}
	last := chain[len(chain)-1]
	if b.Image == nil {
		times, err := b.outerKernel()
		for range times {
			p.extend(application(last.name), last.digest)
		}
		return p, err
	}
	p.extend(application(last.name), last.digest)
	inner, err := b.innerKernel()
	if err != nil || !inner {
		return p, err
	}
	digest, err := authenticodeDigest(b.Image.content(b.Profile, ".linux"))
	if err != nil {
		return p, fmt.Errorf("%w: the kernel in it: %w", ErrNotUKI, err)
	}
	p.extend(application("kernel"), digest)
	return p, nil
}

// grubMeasures says how often the kernel is measured that Debian's GRUB starts behind
// shim, without Secure Boot and with it. Distributions patch how GRUB starts a
// kernel, so of others nothing is known.
var grubMeasures = map[[2]int]struct{ off, on int }{
	{2, 6}: {0, 2}, {2, 12}: {0, 1}, {2, 14}: {1, 1},
}

// outerKernel returns how often a kernel is measured that a loader starts.
func (b *Boot) outerKernel() (int, error) {
	n := len(b.Loaders) - 2
	if n < 0 || b.Loaders[n].kind != kindGRUB {
		return 1, nil // by the firmware's LoadImage, or shim's
	}
	grub := b.Loaders[n]
	times, ok := grubMeasures[grub.version]
	if !ok || !grub.debian || n == 0 {
		return 0, fmt.Errorf("%w: GRUB %d.%d, other than Debian's behind shim", ErrNotModelled, grub.version[0], grub.version[1])
	}
	if err := b.checkShim(); err != nil {
		return 0, err
	}
	if b.SecureBoot {
		return times.on, nil
	}
	return times.off, nil
}

func application(name string) attestation.Event {
	return attestation.Event{Type: "EV_EFI_BOOT_SERVICES_APPLICATION", Name: "EFI application", Detail: name}
}

// shimKnowsParts is the first version of shim that, under Secure Boot, takes over
// the firmware's LoadImage, and neither verifies nor measures again what is a part
// of a program that it has verified. How older versions and each stub get on was
// not seen.
var shimKnowsParts = [2]int{16, 1}

// innerKernel reports whether the kernel in the UKI is measured by itself.
//
// A stub before [directStart] gives it to the firmware's LoadImage. Under Secure
// Boot it first puts itself into the place of the firmware's verification, or asks
// shim, since the kernel alone need not be signed; the firmware's measurement
// happens in its verification, and so does not.
func (b *Boot) innerKernel() (bool, error) {
	if !b.SecureBoot {
		return b.Image.version < directStart, nil
	}
	return false, b.checkShim()
}

// checkShim refuses an old shim under Secure Boot.
func (b *Boot) checkShim() error {
	for _, l := range b.Loaders {
		if b.SecureBoot && l.kind == kindShim && slices.Compare(l.version[:], shimKnowsParts[:]) < 0 {
			return fmt.Errorf("%w: shim %d.%d under Secure Boot", ErrNotModelled, l.version[0], l.version[1])
		}
	}
	return nil
}

// The versions of systemd-boot of which it is known what they make of the command
// line of an image: they pass it on, and measure it, or they leave it to the stub.
const (
	lastPassedOn     = 254
	firstLeftToImage = 257
)

// PCR12 predicts what is measured of command lines beside the image: nothing, but
// for an old systemd-boot, and as long as nobody adds credentials, add-ons or
// words to the command line.
func (b *Boot) PCR12() (Prediction, error) {
	p := newPrediction()
	if err := b.check(); err != nil {
		return p, err
	}
	if b.Image == nil {
		return p, fmt.Errorf("%w: the command line of a kernel that a loader starts", ErrNotModelled)
	}
	n := slices.IndexFunc(b.Loaders, func(l *Loader) bool { return l.kind == kindSystemdBoot })
	if n < 0 {
		if b.Profile > 0 {
			return p, fmt.Errorf("%w: how profile %d is chosen without systemd-boot", ErrNotModelled, b.Profile)
		}
		return p, nil
	}
	version := b.Loaders[n].version[0]
	switch {
	case version >= oldestStub && version <= lastPassedOn:
	case version >= firstLeftToImage && version <= newestStub:
		b.chosenProfile(&p)
		return p, nil
	default:
		return p, fmt.Errorf("%w: systemd-boot %d and the command line of an image", ErrNotModelled, version)
	}
	line := b.Image.CommandLine(b.Profile)
	if line == "" {
		return p, nil
	}
	digest := sha256.Sum256(utf16z(line))
	e := attestation.Event{Type: "EV_IPL", Name: "kernel command line, by the loader", Detail: eventlog.Text([]byte(line))}
	p.extend(e, digest[:])
	if !b.SecureBoot {
		p.extend(e, digest[:]) // the stub, which under Secure Boot takes the image's own
	}
	return p, nil
}

// chosenProfile is what systemd-boot and the stub measure of a profile that is not
// the first: the stub's argument, and its number.
func (b *Boot) chosenProfile(p *Prediction) {
	if b.Profile == 0 {
		return
	}
	n := strconv.Itoa(b.Profile)
	argument, number := sha256.Sum256(utf16z("@"+n)), sha256.Sum256(utf16z(n))
	p.extend(attestation.Event{Type: "EV_IPL", Name: "boot loader: @" + n}, argument[:])
	p.extend(attestation.Event{Type: "EV_EVENT_TAG", Name: "profile, by the stub", Detail: n}, number[:])
}

// utf16z is text as EFI programs have it, with its end.
func utf16z(s string) []byte {
	var out []byte
	for _, u := range append(utf16.Encode([]rune(s)), 0) {
		out = binary.LittleEndian.AppendUint16(out, u)
	}
	return out
}
