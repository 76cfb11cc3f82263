package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/policy"
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

PCRs 4 and 11 come from the unified kernel image, before it was ever started.
All others come from the event log of a boot that is trusted. Each register is
printed with the events that lead to its value, so that a later mismatch can be
explained.`,
		Example: `  keyagent measure --uki linux.efi --pcrs 4,11
  keyagent measure --uki linux.efi --event-log trusted.log --pcrs 0,2,3,4,7,11 --name guest --trust root:lab`,
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
	f.StringVar(&m.uki, "uki", "", "unified kernel image (PCRs 4 and 11)")
	f.StringVar(&m.eventLog, "event-log", "", "event log of a trusted boot (all other PCRs)")
	f.StringArrayVar(&m.phases, "phase", nil, "systemd boot phases that follow in PCR 11, for example sysinit:ready; each --phase gives one more accepted value")
	f.StringSliceVar(&m.trust, "trust", nil, "who vouches for the TPM: root:NAME or enrolled:NAME of the policy")
	f.StringVar(&pcrs, "pcrs", "0,2,3,4,7,11", "registers of the profile")
	return cmd
}

type measurement struct {
	name, uki, eventLog string
	phases, trust       []string
	pcrs                []uint32
}

func (m *measurement) profile() (*policy.Profile, error) {
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
	p := &policy.Profile{Name: m.name, TPM: &policy.TPMProfile{Trust: m.trust, Bank: "sha256", EventLog: "required"}}
	if len(m.trust) == 0 {
		p.TPM.Trust = []string{"root:NAME"}
	}
	for _, pcr := range m.pcrs {
		ref, err := m.reference(pcr, image, log)
		if err != nil {
			return nil, err
		}
		p.TPM.PCRs = append(p.TPM.PCRs, ref)
	}
	return p, nil
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
