// Package uki predicts what a unified kernel image (UKI) puts into PCRs 4 and
// 11, before it was ever started.
//
// PCR 4 receives what the firmware loads: a fixed action, a separator, the
// Authenticode digest of the UKI, and that of the kernel in it, which the stub
// hands to the firmware again. PCR 11 receives each section that the stub uses,
// its name first and its content second. Sources: TCG PC Client Platform
// Firmware Profile 1.06 section 3.3.4, systemd-stub(7), and the order of
// sections in systemd's own list of them.
package uki

import (
	"bytes"
	"crypto/sha256"
	"debug/pe"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/tpm"
)

// ErrNotUKI: the file is not a unified kernel image.
var ErrNotUKI = errors.New("not a unified kernel image")

// maxImage bounds an image in bytes.
const maxImage = 1 << 30

// maxPadding bounds by how much all sections together may be larger in memory
// than in the file, in bytes.
const maxPadding = 1 << 20

// measured are the sections that the stub measures, in its order. The signature
// of the PCR value itself, .pcrsig, cannot be among them.
var measured = []struct{ section, name string }{
	{".linux", "kernel"}, {".osrel", "os-release"}, {".cmdline", "kernel command line"}, {".initrd", "initrd"},
	{".ucode", "microcode"}, {".splash", "splash image"}, {".dtb", "device tree"}, {".uname", "kernel version"},
	{".sbat", "SBAT data"}, {".pcrpkey", "PCR signing key"},
}

// Prediction is the value of one PCR and the events that lead to it.
type Prediction struct {
	Value  []byte
	Events []attestation.Event
}

func (p *Prediction) extend(e attestation.Event, digest []byte) {
	e.Digest = hex.EncodeToString(digest)
	p.Value = tpm.Extend(p.Value, digest)
	p.Events = append(p.Events, e)
}

// Image is a UKI that was read.
type Image struct {
	digest   []byte // Authenticode
	kernel   []byte // Authenticode of the .linux section
	sections map[string][]byte
	stub     string
}

// Open reads the UKI at path.
func Open(path string) (*Image, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxImage+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxImage {
		return nil, fmt.Errorf("%w: %s is larger than %d bytes", ErrNotUKI, path, maxImage)
	}
	img, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return img, nil
}

// Parse reads a UKI.
func Parse(data []byte) (*Image, error) {
	file, err := pe.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotUKI, err)
	}
	defer file.Close()
	img := &Image{sections: map[string][]byte{}}
	room := uint64(len(data)) + maxPadding
	for _, s := range file.Sections {
		if uint64(s.VirtualSize) > room {
			return nil, fmt.Errorf("%w: section %s is larger than the file", ErrNotUKI, s.Name)
		}
		room -= uint64(s.VirtualSize)
		content, err := sectionContent(s, len(data))
		if err != nil {
			return nil, fmt.Errorf("%w: section %s: %w", ErrNotUKI, s.Name, err)
		}
		if _, twice := img.sections[s.Name]; twice {
			return nil, fmt.Errorf("%w: it has two sections %s", ErrNotUKI, s.Name)
		}
		img.sections[s.Name] = content
	}
	if img.sections[".linux"] == nil || img.sections[".sdmagic"] == nil {
		return nil, fmt.Errorf("%w: it has no .linux or no .sdmagic section", ErrNotUKI)
	}
	img.stub = strings.Trim(string(img.sections[".sdmagic"]), "\x00# ")
	if img.digest, err = authenticodeDigest(data); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotUKI, err)
	}
	if img.kernel, err = authenticodeDigest(img.sections[".linux"]); err != nil {
		return nil, fmt.Errorf("%w: the kernel in it: %w", ErrNotUKI, err)
	}
	return img, nil
}

// sectionContent is what the stub sees in memory: the virtual size, padded with
// zeros where the file has less.
func sectionContent(s *pe.Section, fileSize int) ([]byte, error) {
	if int64(s.Size) > int64(fileSize) {
		return nil, errors.New("size out of bounds")
	}
	raw, err := s.Data()
	if err != nil {
		return nil, err
	}
	out := make([]byte, s.VirtualSize)
	copy(out, raw)
	return out, nil
}

// Stub returns what the stub says of itself.
func (img *Image) Stub() string { return img.stub }

// PCR4 predicts the boot applications.
func (img *Image) PCR4() Prediction {
	p := Prediction{Value: make([]byte, sha256.Size)}
	action := sha256.Sum256([]byte("Calling EFI Application from Boot Option"))
	p.extend(attestation.Event{Type: "EV_EFI_ACTION", Name: "Calling EFI Application from Boot Option"}, action[:])
	separator := sha256.Sum256(make([]byte, 4))
	p.extend(attestation.Event{Type: "EV_SEPARATOR", Name: "separator"}, separator[:])
	p.extend(attestation.Event{Type: "EV_EFI_BOOT_SERVICES_APPLICATION", Name: "EFI application", Detail: "unified kernel image"}, img.digest)
	p.extend(attestation.Event{Type: "EV_EFI_BOOT_SERVICES_APPLICATION", Name: "EFI application", Detail: "kernel"}, img.kernel)
	return p
}

// PCR11 predicts the sections, followed by the boot phases that systemd will
// have measured when the value is quoted.
func (img *Image) PCR11(phases ...string) Prediction {
	p := Prediction{Value: make([]byte, sha256.Size)}
	for _, m := range measured {
		content, ok := img.sections[m.section]
		if !ok || !img.measures(m.section) {
			continue
		}
		e := attestation.Event{Type: "EV_IPL", Name: m.name + " (" + m.section + ")"}
		name := sha256.Sum256([]byte(m.section + "\x00"))
		p.extend(attestation.Event{Type: e.Type, Name: e.Name, Detail: "name of the section"}, name[:])
		sum := sha256.Sum256(content)
		p.extend(e, sum[:])
	}
	for _, word := range phases {
		e := tpm.PhaseEvent(word)
		digest, _ := hex.DecodeString(e.Digest)
		p.extend(e, digest)
	}
	return p
}

// measures reports whether this image's stub knows a section. Stubs before
// version 254 have an .sbat section of their own that they do not measure.
func (img *Image) measures(section string) bool {
	var major int
	_, version, _ := strings.Cut(img.stub, "systemd-stub ")
	if _, err := fmt.Sscanf(version, "%d", &major); err != nil {
		return true
	}
	switch section {
	case ".sbat", ".uname":
		return major >= 254
	case ".ucode":
		return major >= 256
	}
	return true
}
