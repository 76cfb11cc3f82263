package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/attestation/tpm/uki"
	"github.com/keyagent/keyagent/internal/failure"
)

func newMeasure() *cobra.Command {
	var m measurement
	var pcrs string
	cmd := &cobra.Command{
		Use:   "measure",
		Short: "Print the reference values of a machine as a policy profile",
		Long: `Print the reference values of a machine as a policy profile.

With --evidence they are what a trusted machine's saved evidence says, of every
kind that is in it; a report or quote that another tool saved will do. Weaknesses
that the machine has stand in "allow", to be read before they are accepted.

With --firmware the SNP launch measurement or the TDX MRTD is computed from the
firmware file, for the machines of Google Compute Engine.

Of a TPM, PCRs 4 and 11 come from the unified kernel image, before it was ever
started. All others come from the event log of a boot that is trusted. Each
register is printed with the events that lead to its value, so that a later
mismatch can be explained.`,
		Example: `  keyagent measure --uki linux.efi --pcrs 4,11
  keyagent measure --uki linux.efi --event-log trusted.log --pcrs 0,2,3,4,7,11 --name guest --trust root:lab
  keyagent measure --evidence evidence.json --name cvm
  keyagent measure --evidence report.bin --firmware ovmf.fd --product Milan --vcpus 4`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if m.pcrs, err = parsePCRs(pcrs); err != nil {
				return err
			}
			profile, err := m.profile()
			if err != nil {
				return err
			}
			return printProfile(cmd.OutOrStdout(), profile)
		},
	}
	f := cmd.Flags()
	f.StringVar(&m.name, "name", "machine", "name of the profile")
	f.StringVar(&m.evidence, "evidence", "", "saved evidence of a machine that is trusted, or an SNP report or TDX quote")
	f.StringVar(&m.firmware, "firmware", "", "firmware file of the machine (SNP launch measurement, or TDX MRTD)")
	f.StringVar(&m.product, "product", "", "Milan, Genoa or Turin: of an SNP report of version 2, which does not say, and with --firmware, where none means TDX")
	f.UintVar(&m.vcpus, "vcpus", 1, "with --firmware, for SNP: processors of the machine")
	f.StringVar(&m.uki, "uki", "", "unified kernel image (PCRs 4 and 11)")
	f.StringVar(&m.eventLog, "event-log", "", "event log of a trusted boot (all other PCRs)")
	f.StringArrayVar(&m.phases, "phase", nil, "systemd boot phases that follow in PCR 11, for example sysinit:ready; each --phase gives one more accepted value")
	f.StringSliceVar(&m.trust, "trust", nil, "who vouches for the TPM: root:NAME, enrolled:NAME or ak-root:NAME of the policy")
	f.StringVar(&pcrs, "pcrs", "0,2,3,4,7,11", "registers of the profile")
	return cmd
}

type measurement struct {
	name, uki, eventLog         string
	evidence, firmware, product string
	vcpus                       uint
	phases, trust               []string
	pcrs                        []uint32
}

func (m *measurement) profile() (*policy.Profile, error) {
	p := &policy.Profile{Name: m.name}
	if m.evidence != "" {
		var err error
		if p, err = m.fromEvidence(); err != nil {
			return nil, err
		}
	}
	if m.firmware != "" {
		if err := m.fromFirmware(p); err != nil {
			return nil, err
		}
	}
	if m.uki != "" || m.eventLog != "" || (m.evidence == "" && m.firmware == "") {
		t, err := m.tpm(p.TPM())
		if err != nil {
			return nil, err
		}
		p.Set(attestation.TPM, t)
	}
	if t := p.TPM(); t != nil && len(m.trust) > 0 {
		t.Trust = m.trust
	}
	return p, nil
}

// fromEvidence takes what saved evidence says, without verifying it: that the
// machine is trusted is the caller's word.
func (m *measurement) fromEvidence() (*policy.Profile, error) {
	s, err := readEvidence(m.evidence)
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
	p, err := policy.Reference(policy.Builtin(), m.name, "evidence "+m.evidence, all)
	if errors.Is(err, policy.ErrMasked) {
		return nil, failure.New(failure.EvidenceRefused, err, "have the host unmask it (MASK_CHIP_ID off), or use a VLEK")
	}
	if err != nil {
		return nil, failure.New(failure.EvidenceRefused, err, "launch the machine with a guest policy that forbids debugging")
	}
	if s := p.SNP(); s != nil && len(s.Products) == 0 {
		// A report of version 2 does not say.
		if !slices.Contains(policy.Products(), m.product) {
			return nil, failure.Newf(failure.Usage, "--product Milan, or "+strings.Join(policy.Products()[1:], " or "),
				"the report does not name its product line, and --product is %q", m.product)
		}
		s.Products = []string{m.product}
	}
	if t := p.TPM(); t != nil {
		t.PCRs = slices.DeleteFunc(t.PCRs, func(r policy.PCR) bool { return !slices.Contains(m.pcrs, *r.PCR) })
	}
	return p, nil
}

// tpm makes the section of a TPM from files. What evidence gave for a register is
// kept if the files do not give it.
func (m *measurement) tpm(have *policy.TPMProfile) (*policy.TPMProfile, error) {
	var image *uki.Image
	var log *tpm.EventLog
	var err error
	if m.uki != "" {
		if image, err = uki.Open(m.uki); err != nil {
			return nil, failure.New(failure.Usage, err, "")
		}
	}
	if m.eventLog != "" {
		data, err := readBounded(m.eventLog, tpm.MaxEventLog)
		if err != nil {
			return nil, err
		}
		if log, err = tpm.ParseEventLog(data); err != nil {
			return nil, failure.New(failure.EvidenceRefused, err, "")
		}
	}
	if have == nil {
		have = &policy.TPMProfile{Trust: []string{"root:NAME"}, Bank: "sha256", EventLog: "required"}
	}
	before := have.PCRs
	have.PCRs = nil
	for _, pcr := range m.pcrs {
		n := slices.IndexFunc(before, func(r policy.PCR) bool { return *r.PCR == pcr })
		if n >= 0 && log == nil && (image == nil || (pcr != 4 && pcr != 11)) {
			have.PCRs = append(have.PCRs, before[n])
			continue
		}
		ref, err := m.reference(pcr, image, log)
		if err != nil {
			return nil, err
		}
		have.PCRs = append(have.PCRs, ref)
	}
	return have, nil
}

func (m *measurement) reference(pcr uint32, image *uki.Image, log *tpm.EventLog) (policy.PCR, error) {
	var value []byte
	var events []attestation.Event
	var source string
	switch {
	case image != nil && pcr == 4:
		p := image.PCR4()
		value, events, source = p.Value, p.Events, "computed from "+m.uki
	case image != nil && pcr == 11:
		return m.imageReference(image), nil
	case log != nil:
		var err error
		if value, events, err = log.Replay(pcr); err != nil {
			return policy.PCR{}, failure.New(failure.EvidenceRefused, err, "")
		}
		if len(events) == 0 {
			return policy.PCR{}, failure.Newf(failure.Usage, "leave it out of --pcrs", "the event log has nothing for PCR %d", pcr)
		}
		source = "event log " + m.eventLog
	default:
		return policy.PCR{}, failure.Newf(failure.Usage, "--uki gives PCRs 4 and 11, --event-log all others", "nothing gives PCR %d", pcr)
	}
	for i := range events {
		events[i].Seq = 0
	}
	return policy.PCR{PCR: &pcr, Accept: []string{hexOf(value)}, Source: source, Events: events}, nil
}

// imageReference accepts PCR 11 at each of the boot phases that were named.
func (m *measurement) imageReference(image *uki.Image) policy.PCR {
	pcr := uint32(11)
	ref := policy.PCR{PCR: &pcr, Source: "computed from " + m.uki}
	paths := m.phases
	if len(paths) == 0 {
		paths = []string{""}
	}
	for _, path := range paths {
		p := image.PCR11(strings.FieldsFunc(path, func(r rune) bool { return r == ':' })...)
		ref.Accept = append(ref.Accept, hexOf(p.Value))
		if ref.Events == nil {
			ref.Events = p.Events
		}
	}
	return ref
}

func printProfile(w io.Writer, p *policy.Profile) error {
	var out strings.Builder
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := e.Encode([]*policy.Profile{p}); err != nil {
		return err
	}
	if err := e.Close(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "# An entry of \"profiles:\" in a policy.\n%s", out.String())
	return err
}

func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, failure.New(failure.Usage, err, "")
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = failure.Newf(failure.Usage, "", "%s is larger than %d bytes", path, limit)
	}
	return data, err
}

// hexOf is for output.
func hexOf(b []byte) string { return hex.EncodeToString(b) }
