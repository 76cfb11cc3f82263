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

The profile accepts the very processor or platform of the evidence. --any-chip and
--any-platform accept every one: also one whose owner has put a device between it
and its memory, which no evidence shows.

With --firmware the SNP launch measurement or the TDX MRTD is computed from the
firmware file, for the machines of Google Compute Engine.

Of a TPM, PCRs 4, 11 and 12 are computed from the unified kernel image and from
what is started before it (--loader, once for each program, in their order),
before any of it was started. Without --loader the firmware starts the image. The
chain may end with a kernel without an image
around it, as the last --loader; then only PCR 4 is computed. All other PCRs come
from the event log of a boot that is trusted. A stub, loader or section whose
measurements are not known is an error, and so is a register that nothing gives,
unless --pcrs is left out: then it is left out too, and the output says why.

Under Secure Boot stubs before systemd 258 lead to another PCR 4. The event log
says whether it is on, or --secure-boot does; otherwise both values are accepted.

The initrd of systemd 261 and later extends PCRs 0-7, 9 and 12-14 by the word
"os-separator" (--os-separator). --userspace-log names systemd's own log of such
words, /run/log/systemd/tpm2-measure.log, of a trusted boot.

Each register is printed with the events that lead to its value, so that a later
mismatch can be explained.`,
		Example: `  keyagent measure --uki linux.efi --pcrs 4,11
  keyagent measure --uki linux.efi --event-log trusted.log --pcrs 0,2,3,4,7,11 --name guest --trust root:lab
  keyagent measure --loader shimx64.efi --loader systemd-bootx64.efi --uki linux.efi --secure-boot --pcrs 4,11
  keyagent measure --loader shimx64.efi --loader grubx64.efi --loader vmlinuz --pcrs 4
  keyagent measure --evidence evidence.json --name cvm
  keyagent measure --evidence report.bin --firmware ovmf.fd --product Milan --vcpus 4`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if m.pcrs, err = parsePCRs(pcrs); err != nil {
				return err
			}
			m.leaveOut = !cmd.Flags().Changed("pcrs")
			m.secureBootSaid = cmd.Flags().Changed("secure-boot")
			m.separatorSaid = cmd.Flags().Changed("os-separator")
			profile, err := m.profile()
			if err != nil {
				return err
			}
			for _, note := range m.notes {
				fmt.Fprintf(cmd.ErrOrStderr(), "note: %s\n", note)
			}
			return printProfile(cmd.OutOrStdout(), profile, m.notes)
		},
	}
	f := cmd.Flags()
	f.StringVar(&m.name, "name", "machine", "name of the profile")
	f.StringVar(&m.evidence, "evidence", "", "saved evidence of a machine that is trusted, or an SNP report or TDX quote")
	f.StringVar(&m.firmware, "firmware", "", "firmware file of the machine (SNP launch measurement, or TDX MRTD)")
	f.StringVar(&m.product, "product", "", "Milan, Genoa or Turin: of an SNP report of version 2, which does not say, and with --firmware, where none means TDX")
	f.UintVar(&m.vcpus, "vcpus", 1, "with --firmware, for SNP: processors of the machine")
	f.BoolVar(&m.anyChip, "any-chip", false, "accept every AMD processor, not the one of the evidence alone")
	f.BoolVar(&m.anyPlatform, "any-platform", false, "accept every Intel platform, not the one of the evidence alone")
	f.StringVar(&m.uki, "uki", "", "unified kernel image (PCRs 4, 11 and 12)")
	f.StringArrayVar(&m.loaders, "loader", nil, "shim, systemd-boot or GRUB that is started before the image, or a kernel without one; once for each, in their order")
	f.IntVar(&m.profileNumber, "profile", 0, "profile of the image, counted from 0")
	f.BoolVar(&m.secureBoot, "secure-boot", false, "Secure Boot is on (default: what the event log says, or either)")
	f.StringVar(&m.eventLog, "event-log", "", "event log of a trusted boot (all other PCRs)")
	f.StringVar(&m.userLog, "userspace-log", "", "systemd's own log of a trusted boot, "+tpm.DefaultUserspaceLog)
	f.BoolVar(&m.separator, "os-separator", false, "the initrd has systemd 261 or later, which separates PCRs 0-7, 9 and 12-14")
	f.StringArrayVar(&m.phases, "phase", nil, "systemd boot phases that follow in PCR 11, for example sysinit:ready; each --phase gives one more accepted value")
	f.StringSliceVar(&m.trust, "trust", nil, "who vouches for the TPM: root:NAME, enrolled:NAME or ak-root:NAME of the policy")
	f.StringVar(&pcrs, "pcrs", "0,2,3,4,7,11", "registers of the profile")
	return cmd
}

type measurement struct {
	name, uki, eventLog, userLog string
	evidence, firmware, product  string
	vcpus                        uint
	loaders, phases, trust       []string
	profileNumber                int
	secureBoot, secureBootSaid   bool
	separator, separatorSaid     bool
	pcrs                         []uint32
	anyChip, anyPlatform         bool
	leaveOut                     bool     // registers that nothing gives
	notes                        []string // for people
}

func (m *measurement) note(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); !slices.Contains(m.notes, text) {
		m.notes = append(m.notes, text)
	}
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
	if m.uki != "" || len(m.loaders) > 0 || m.eventLog != "" || (m.evidence == "" && m.firmware == "") {
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
	m.chips(p)
	if t := p.TPM(); t != nil {
		for _, r := range t.PCRs {
			if r.EventLog == "optional" && slices.Contains(m.pcrs, *r.PCR) {
				m.note("the event log does not lead to PCR %d: the profile has the value of the quote, and no events to explain another", *r.PCR)
			}
		}
		t.PCRs = slices.DeleteFunc(t.PCRs, func(r policy.PCR) bool { return !slices.Contains(m.pcrs, *r.PCR) })
	}
	return p, nil
}

// chips widens what the evidence names only where that was asked for.
func (m *measurement) chips(p *policy.Profile) {
	const every = "WARNING: every %s is accepted, also one whose owner has a device on its memory bus"
	if s := p.SNP(); s != nil {
		if m.anyChip {
			s.Chips, s.AnyChip = nil, true
			m.note(every, "AMD processor (any_chip)")
		}
		if !s.AnyChip && len(s.Chips) == 0 {
			m.note("the report has no chip ID, as its key is the cloud's (VLEK): the policy is refused until \"chips\" is written, or --any-chip given")
		}
	}
	if t := p.TDX(); t != nil {
		if m.anyPlatform {
			t.Platforms, t.AnyPlatform = nil, true
			m.note(every, "Intel platform (any_platform)")
		}
		if !t.AnyPlatform && len(t.Platforms) == 0 {
			m.note("the quote names no platform: the policy is refused until \"platforms\" is written, or --any-platform given")
		}
	}
}

func printProfile(w io.Writer, p *policy.Profile, notes []string) error {
	var out strings.Builder
	out.WriteString("# An entry of \"profiles:\" in a policy.\n")
	for _, note := range notes {
		fmt.Fprintf(&out, "# %s\n", note)
	}
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := e.Encode([]*policy.Profile{p}); err != nil {
		return err
	}
	if err := e.Close(); err != nil {
		return err
	}
	_, err := io.WriteString(w, out.String())
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
