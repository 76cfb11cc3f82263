//go:build !keyagent_node

package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/measure"
)

func newMeasure() *cobra.Command {
	var m measure.Request
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
			if m.PCRs, err = parsePCRs(pcrs); err != nil {
				return err
			}
			m.LeaveOut = !cmd.Flags().Changed("pcrs")
			m.SecureBootSaid = cmd.Flags().Changed("secure-boot")
			m.OSSeparatorSaid = cmd.Flags().Changed("os-separator")
			profile, err := m.Profile()
			if err != nil {
				return err
			}
			for _, note := range m.Notes {
				fmt.Fprintf(cmd.ErrOrStderr(), "note: %s\n", note)
			}
			return printProfile(cmd.OutOrStdout(), profile, m.Notes)
		},
	}
	f := cmd.Flags()
	f.StringVar(&m.Name, "name", "machine", "name of the profile")
	f.StringVar(&m.Evidence, "evidence", "", "saved evidence of a machine that is trusted, or an SNP report or TDX quote")
	f.StringVar(&m.Firmware, "firmware", "", "firmware file of the machine (SNP launch measurement, or TDX MRTD)")
	f.StringVar(&m.Product, "product", "", "Milan, Genoa or Turin: of an SNP report of version 2, which does not say, and with --firmware, where none means TDX")
	f.UintVar(&m.VCPUs, "vcpus", 1, "with --firmware, for SNP: processors of the machine")
	f.BoolVar(&m.AnyChip, "any-chip", false, "accept every AMD processor, not the one of the evidence alone")
	f.BoolVar(&m.AnyPlatform, "any-platform", false, "accept every Intel platform, not the one of the evidence alone")
	f.StringVar(&m.UKI, "uki", "", "unified kernel image (PCRs 4, 11 and 12)")
	f.StringArrayVar(&m.Loaders, "loader", nil, "shim, systemd-boot or GRUB that is started before the image, or a kernel without one; once for each, in their order")
	f.IntVar(&m.UKIProfile, "profile", 0, "profile of the image, counted from 0")
	f.BoolVar(&m.SecureBoot, "secure-boot", false, "Secure Boot is on (default: what the event log says, or either)")
	f.StringVar(&m.EventLog, "event-log", "", "event log of a trusted boot (all other PCRs)")
	f.StringVar(&m.UserspaceLog, "userspace-log", "", "systemd's own log of a trusted boot, "+tpm.DefaultUserspaceLog)
	f.BoolVar(&m.OSSeparator, "os-separator", false, "the initrd has systemd 261 or later, which separates PCRs 0-7, 9 and 12-14")
	f.StringArrayVar(&m.Phases, "phase", nil, "systemd boot phases that follow in PCR 11, for example sysinit:ready; each --phase gives one more accepted value")
	f.StringSliceVar(&m.Trust, "trust", nil, "who vouches for the TPM: root:NAME, enrolled:NAME or ak-root:NAME of the policy")
	f.StringVar(&pcrs, "pcrs", "0,2,3,4,7,11", "registers of the profile")
	return cmd
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
