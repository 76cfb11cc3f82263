// Package measure makes the reference values of a machine: from its evidence, from the
// firmware, kernel image and loaders that it starts, and from the log of a boot that is
// trusted.
package measure

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/internal/evidence"
	"github.com/keyagent/keyagent/internal/failure"
)

// Request says what there is to measure. What is empty is not there.
type Request struct {
	Name     string // of the profile
	Evidence string // path of saved evidence
	Firmware string // path
	Product  string // AMD's product line, where nothing else says it; with Firmware, empty means TDX
	VCPUs    uint   // with Firmware, for SNP

	UKI          string   // path of a unified kernel image
	Loaders      []string // paths of what is started before it, in order
	UKIProfile   int      // of the image, from 0
	EventLog     string   // path of the log of a trusted boot
	UserspaceLog string   // path of systemd's own log of it
	Phases       []string // of systemd, that follow in PCR 11
	PCRs         []uint32 // of the profile
	LeaveOut     bool     // registers that nothing gives, in place of an error
	Trust        []string // who vouches for the TPM

	// Each of these was said, or is the default.
	SecureBoot, SecureBootSaid   bool
	OSSeparator, OSSeparatorSaid bool

	AnyChip, AnyPlatform bool // in place of the one of the evidence

	Notes []string // for people, set by Profile
}

func (m *Request) note(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); !slices.Contains(m.Notes, text) {
		m.Notes = append(m.Notes, text)
	}
}

// Profile computes the profile. Its errors have classes and hints for people.
func (m *Request) Profile() (*policy.Profile, error) {
	p := &policy.Profile{Name: m.Name}
	if m.Evidence != "" {
		var err error
		if p, err = m.fromEvidence(); err != nil {
			return nil, err
		}
	}
	if m.Firmware != "" {
		if err := m.fromFirmware(p); err != nil {
			return nil, err
		}
	}
	if m.UKI != "" || len(m.Loaders) > 0 || m.EventLog != "" || (m.Evidence == "" && m.Firmware == "") {
		t, err := m.tpm(p.TPM())
		if err != nil {
			return nil, err
		}
		p.Set(attestation.TPM, t)
	}
	if t := p.TPM(); t != nil && len(m.Trust) > 0 {
		t.Trust = m.Trust
	}
	return p, nil
}

// fromEvidence takes what saved evidence says, without verifying it: that the
// machine is trusted is the caller's word.
func (m *Request) fromEvidence() (*policy.Profile, error) {
	s, err := evidence.Read(m.Evidence)
	if err != nil {
		return nil, err
	}
	var all []attestation.Claims
	for _, k := range saved.Kinds(s) {
		claims, err := kinds.All().Claims(s, k)
		if err != nil {
			return nil, failure.New(failure.EvidenceRefused, err, "")
		}
		all = append(all, claims...)
	}
	p, err := policy.Reference(policy.Builtin(), m.Name, "evidence "+m.Evidence, all)
	if errors.Is(err, policy.ErrMasked) {
		return nil, failure.New(failure.EvidenceRefused, err, "have the host unmask it (MASK_CHIP_ID off), or use a VLEK")
	}
	if err != nil {
		return nil, failure.New(failure.EvidenceRefused, err, "launch the machine with a guest policy that forbids debugging")
	}
	if s := p.SNP(); s != nil && len(s.Products) == 0 {
		// A report of version 2 does not say.
		if !slices.Contains(policy.Products(), m.Product) {
			return nil, failure.Newf(failure.Usage, "--product Milan, or "+strings.Join(policy.Products()[1:], " or "),
				"the report does not name its product line, and --product is %q", m.Product)
		}
		s.Products = []string{m.Product}
	}
	m.chips(p)
	if t := p.TPM(); t != nil {
		for _, r := range t.PCRs {
			if r.EventLog == "optional" && slices.Contains(m.PCRs, *r.PCR) {
				m.note("the event log does not lead to PCR %d: the profile has the value of the quote, and no events to explain another", *r.PCR)
			}
		}
		t.PCRs = slices.DeleteFunc(t.PCRs, func(r policy.PCR) bool { return !slices.Contains(m.PCRs, *r.PCR) })
	}
	return p, nil
}

// chips widens what the evidence names only where that was asked for.
func (m *Request) chips(p *policy.Profile) {
	const every = "WARNING: every %s is accepted, also one whose owner has a device on its memory bus"
	if s := p.SNP(); s != nil {
		if m.AnyChip {
			s.Chips, s.AnyChip = nil, true
			m.note(every, "AMD processor (any_chip)")
		}
		if !s.AnyChip && len(s.Chips) == 0 {
			m.note("the report has no chip ID, as its key is the cloud's (VLEK): the policy is refused until \"chips\" is written, or --any-chip given")
		}
	}
	if t := p.TDX(); t != nil {
		if m.AnyPlatform {
			t.Platforms, t.AnyPlatform = nil, true
			m.note(every, "Intel platform (any_platform)")
		}
		if !t.AnyPlatform && len(t.Platforms) == 0 {
			m.note("the quote names no platform: the policy is refused until \"platforms\" is written, or --any-platform given")
		}
	}
}
