// Package uki predicts what a unified kernel image (UKI), and what is started
// before it, puts into PCRs 4, 11 and 12 before it was ever started.
//
// PCR 4 receives what the firmware loads: a fixed action, a separator, and the
// Authenticode digest of each EFI program, see [Boot]. PCR 11 receives each
// section that the stub uses, its name first and its content second, see
// [Image.PCR11]. Sources: TCG PC Client Platform Firmware Profile 1.06 section
// 3.3.4, systemd-stub(7), and boots of every version that is modelled.
//
// A stub, a loader or a section that is not modelled is [ErrNotModelled], never
// a value.
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
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/eventlog"
	"github.com/keyagent/keyagent/attestation/tpm"
)

var (
	// ErrNotUKI means that the file is not a unified kernel image.
	ErrNotUKI = errors.New("not a unified kernel image")
	// ErrNotModelled means that what the file measures is not known here.
	ErrNotModelled = errors.New("what it measures is not known")
)

const (
	// maxImage bounds an image in bytes.
	maxImage = 1 << 30
	// maxPadding bounds by how much all sections together may be larger in memory
	// than in the file, in bytes.
	maxPadding = 1 << 20
	// maxSections bounds the sections of an image; stubs have room for some hundred.
	maxSections = 1024
	// maxVariants bounds the values of PCR 11 that one image leads to.
	maxVariants = 64
)

// Prediction is the value of one PCR and the events that lead to it.
type Prediction struct {
	Value  []byte
	Events []attestation.Event
}

func newPrediction() Prediction { return Prediction{Value: make([]byte, sha256.Size)} }

func (p *Prediction) extend(e attestation.Event, digest []byte) {
	e.Digest = hex.EncodeToString(digest)
	p.Value = tpm.Extend(p.Value, digest)
	p.Events = append(p.Events, e)
}

// Append adds events that happen behind these.
func (p *Prediction) Append(events ...attestation.Event) {
	for _, e := range events {
		digest, _ := hex.DecodeString(e.Digest)
		p.extend(e, digest)
	}
}

// Words adds what user space measures behind the image, one word after the other.
func (p *Prediction) Words(words ...string) {
	for _, w := range words {
		p.Append(tpm.WordEvent(w))
	}
}

// Image is a UKI that was read.
type Image struct {
	program
	version int         // of the stub
	base    []section   // before the first .profile
	profile [][]section // each begins with its .profile
}

type section struct {
	name string
	data []byte // as the stub sees it in memory
}

// Open reads the UKI at path.
func Open(path string) (*Image, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	img, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return img, nil
}

func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxImage+1))
	if err == nil && len(data) > maxImage {
		err = fmt.Errorf("%w: %s is larger than %d bytes", ErrNotUKI, path, maxImage)
	}
	return data, err
}

// Parse reads a UKI.
func Parse(data []byte) (*Image, error) {
	sections, err := parseSections(data)
	if err != nil {
		return nil, err
	}
	img := &Image{}
	for _, s := range sections {
		switch {
		case s.name == ".profile":
			img.profile = append(img.profile, []section{s})
		case len(img.profile) > 0:
			last := len(img.profile) - 1
			img.profile[last] = append(img.profile[last], s)
		default:
			img.base = append(img.base, s)
		}
	}
	magic := find(img.base, ".sdmagic")
	if magic == nil || (find(img.base, ".linux") == nil && len(img.profile) == 0) {
		return nil, fmt.Errorf("%w: it has no .linux or no .sdmagic section", ErrNotUKI)
	}
	stub := strings.TrimPrefix(strings.Trim(string(magic), "\x00# "), "LoaderInfo: ")
	if img.version, err = stubVersion(stub); err != nil {
		return nil, err
	}
	if len(img.profile) > 0 && img.version < profiles {
		return nil, fmt.Errorf("%w: stub %q knows no section .profile", ErrNotModelled, stub)
	}
	for _, part := range append([][]section{img.base}, img.profile...) {
		if err := checkSections(part); err != nil {
			return nil, err
		}
	}
	if img.digest, err = authenticodeDigest(data); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotUKI, err)
	}
	img.kind, img.name, img.smbios = kindUKI, "unified kernel image", namesSMBIOS(img.base)
	for n := range max(len(img.profile), 1) {
		kernel := img.content(n, ".linux")
		if kernel == nil {
			return nil, fmt.Errorf("%w: profile %d has no .linux section", ErrNotUKI, n)
		}
		if _, err := authenticodeDigest(kernel); err != nil {
			return nil, fmt.Errorf("%w: the kernel in it: %w", ErrNotUKI, err)
		}
		if n := len(img.variants(n)); n > maxVariants {
			return nil, fmt.Errorf("%w: it has %d combinations of device trees and firmware, at most %d", ErrNotModelled, n, maxVariants)
		}
	}
	return img, nil
}

func parseSections(data []byte) ([]section, error) {
	file, err := pe.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotUKI, err)
	}
	defer file.Close()
	if len(file.Sections) > maxSections {
		return nil, fmt.Errorf("%w: it has %d sections, at most %d", ErrNotUKI, len(file.Sections), maxSections)
	}
	var out []section
	room := uint64(len(data)) + maxPadding
	for _, s := range file.Sections {
		if uint64(s.VirtualSize) > room {
			return nil, fmt.Errorf("%w: section %s is larger than the file", ErrNotUKI, s.Name)
		}
		room -= uint64(s.VirtualSize)
		content, err := sectionContent(s, data)
		if err != nil {
			return nil, fmt.Errorf("%w: section %s: %w", ErrNotUKI, s.Name, err)
		}
		out = append(out, section{s.Name, content})
	}
	return out, nil
}

// checkSections refuses what leaves open what the stub measures.
func checkSections(part []section) error {
	seen := map[string]bool{}
	for _, s := range part {
		if !knownSection(s.name) {
			return fmt.Errorf("%w: section %.16q", ErrNotModelled, s.name)
		}
		if seen[s.name] && !slices.Contains(choices, s.name) {
			return fmt.Errorf("%w: it has two sections %s", ErrNotUKI, s.name)
		}
		seen[s.name] = true
	}
	return nil
}

// sectionContent is what the stub sees in memory: the virtual size, padded with
// zeros where the file has less.
func sectionContent(s *pe.Section, file []byte) ([]byte, error) {
	from, size := uint64(s.Offset), uint64(min(s.Size, s.VirtualSize))
	if from+size > uint64(len(file)) {
		return nil, errors.New("size out of bounds")
	}
	raw := file[from : from+size : from+size]
	if s.VirtualSize > s.Size {
		raw = append(raw, make([]byte, s.VirtualSize-s.Size)...)
	}
	return raw, nil
}

func find(part []section, name string) []byte {
	for _, s := range part {
		if s.name == name && len(s.data) > 0 {
			return s.data
		}
	}
	return nil
}

// content returns a section of one profile: its own, or the common one.
func (img *Image) content(profile int, name string) []byte {
	if profile < len(img.profile) {
		if own := find(img.profile[profile], name); own != nil {
			return own
		}
	}
	return find(img.base, name)
}

// StubVersion returns systemd's major version of the stub.
func (img *Image) StubVersion() int { return img.version }

// Profiles returns the text of each .profile section, in the image's order: none
// for an image without. The stub starts the first if nothing names another.
func (img *Image) Profiles() []string {
	var out []string
	for _, p := range img.profile {
		out = append(out, string(p[0].data))
	}
	return out
}

// CommandLine returns the kernel command line of one profile, or "".
func (img *Image) CommandLine(profile int) string {
	return strings.TrimRight(string(img.content(profile, ".cmdline")), "\x00")
}

// checkProfile refuses a profile that the image does not have.
func (img *Image) checkProfile(profile int) error {
	if profile < 0 || profile >= max(len(img.profile), 1) {
		return fmt.Errorf("%w: the image has %d profiles, counted from 0, and no profile %d", ErrNotUKI, len(img.profile), profile)
	}
	return nil
}

// PCR11 predicts the sections of one profile; 0 is the first, and the whole image
// if it has none. There are several predictions if the image has device trees or
// firmware of which the machine's hardware chooses: one for each choice, the first
// for a machine that none fits.
func (img *Image) PCR11(profile int) ([]Prediction, error) {
	if err := img.checkProfile(profile); err != nil {
		return nil, err
	}
	var out []Prediction
	for _, choice := range img.variants(profile) {
		p := newPrediction()
		for _, m := range measured {
			content := img.content(profile, m.section)
			if slices.Contains(choices, m.section) {
				content = choice[m.section]
			}
			if len(content) == 0 || img.version < m.since {
				continue
			}
			e := attestation.Event{Type: "EV_IPL", Name: eventlog.SectionName(m.section)}
			name := sha256.Sum256([]byte(m.section + "\x00"))
			p.extend(attestation.Event{Type: e.Type, Name: e.Name, Detail: "name of the section"}, name[:])
			e.Detail = sectionText(m.section, content)
			sum := sha256.Sum256(content)
			p.extend(e, sum[:])
		}
		out = append(out, p)
	}
	return out, nil
}

// sectionText is what a person can read of a section, and compare.
func sectionText(name string, content []byte) string {
	switch name {
	case ".cmdline", ".uname", ".profile":
		return eventlog.Text(content)
	}
	return ""
}

// variants are the ways in which a machine may choose among sections.
func (img *Image) variants(profile int) []map[string][]byte {
	out := []map[string][]byte{{}}
	for _, name := range choices {
		part := img.base
		if profile < len(img.profile) && find(img.profile[profile], name) != nil {
			part = img.profile[profile]
		}
		for _, before := range slices.Clone(out) {
			for _, s := range part {
				if s.name != name || len(s.data) == 0 || len(out) > maxVariants {
					continue
				}
				one := map[string][]byte{name: s.data}
				for k, v := range before {
					one[k] = v
				}
				out = append(out, one)
			}
		}
	}
	return out
}
