package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/evidence"
	"github.com/keyagent/keyagent/internal/failure"
)

// parsePCRs reads a list such as "0-4,7,11".
func parsePCRs(s string) ([]uint32, error) {
	var out []uint32
	for part := range strings.SplitSeq(s, ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		a, err1 := strconv.ParseUint(from, 10, 5)
		b, err2 := strconv.ParseUint(to, 10, 5)
		if err1 != nil || err2 != nil || a > b || b > 23 {
			return nil, failure.Newf(failure.Usage, "for example 0-4,7,11", "%q is not a list of PCRs", s)
		}
		for n := a; n <= b; n++ {
			out = append(out, uint32(n))
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// endorsementFlags say where endorsements come from.
type endorsementFlags struct {
	cfg kinds.EndorsementConfig
}

func (e *endorsementFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&e.cfg.Cache, "cache", "", "folder that keeps endorsements (default: none is kept)")
	f.StringToStringVar(&e.cfg.Mirrors, "mirror", nil, "a mirror to ask instead of a vendor: amd=URL or intel=URL")
}

func (e *endorsementFlags) open(ask ...string) (*endorsement.Cache, error) {
	cfg := e.cfg
	if cfg.Cache != "" {
		var err error
		if cfg.Cache, err = filepath.Abs(cfg.Cache); err != nil {
			return nil, failure.New(failure.Usage, err, "")
		}
	}
	source, err := cfg.Open(ask...)
	if err != nil {
		return nil, failure.New(failure.Usage, err, "")
	}
	return source, nil
}

func newEvidence() *cobra.Command {
	var opts kinds.IssuerOptions
	var from endorsementFlags
	var names []string
	var ek, ak, pcrs, file string
	var endorse bool
	cmd := &cobra.Command{
		Use:   "evidence",
		Short: "Collect what this machine can prove",
		Long: `Collect what this machine can prove, and show it. With --file it is saved, for
"keyagent verify" on another machine. Saved evidence is not fresh: it answers a
question that the machine asked itself.

Without --evidence the strongest kinds that the machine has are used, and the
output says which and why. With --with-endorsements the vendors' certificates,
revocation lists and TCB levels are put into the evidence, so that anyone who
verifies it has to ask nobody.`,
		Example: `  keyagent evidence
  keyagent evidence --file evidence.json --with-endorsements
  keyagent evidence --evidence snp,tpm`,
		Args: cobra.NoArgs,
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		list, err := parsePCRs(pcrs)
		if err != nil {
			return err
		}
		if opts.Kinds, err = kinds.All().Parse(names); err != nil {
			return failure.New(failure.Usage, err, "")
		}
		opts.TPM.EK, opts.TPM.AK = tpm.EKType(ek), tpm.AKType(ak)
		opts.Log = func(msg string, err error) { fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s: %v\n", msg, err) }
		if endorse {
			source, err := from.open("amd", "intel")
			if err != nil {
				return err
			}
			defer source.Close()
			opts.Endorsements = source
		}
		collected, findings, err := collect(cmd.Context(), opts, list)
		if err != nil {
			return err
		}
		if file != "" {
			if err := saved.Write(file, collected); err != nil {
				return failure.New(failure.Usage, err, "")
			}
		}
		shown, err := show(collected)
		if err != nil {
			return err
		}
		shown.Findings = findings
		return print(cmd, *output, shown, shown.print)
	}
	f := cmd.Flags()
	f.StringSliceVar(&names, "evidence", nil, "kinds of evidence to give, for example snp,tpm (default: the strongest that is there)")
	f.StringVar(&opts.TPM.Device, "device", tpm.DefaultDevice, "TPM device, or unix:PATH of a software TPM")
	f.StringVar(&ek, "ek", string(tpm.EKAuto), "endorsement key: auto, rsa-2048 or ecc-p384")
	f.StringVar(&ak, "ak", string(tpm.AKAuto), "attestation key: auto, own, or cloud for one that the cloud certified")
	f.StringVar(&opts.TPM.EventLog, "event-log", tpm.DefaultEventLog, "the firmware's event log")
	f.StringVar(&pcrs, "pcrs", "0-7,11", "PCRs to quote")
	f.StringVar(&file, "file", "", "save the evidence to this file")
	f.StringVar(&opts.Metadata, "metadata", "", "base URL of Azure's metadata service (default: Azure's own)")
	f.StringVar(&opts.Attestation, "attestation", "", "Microsoft Attestation service to get a token from (default: none)")
	f.BoolVar(&endorse, "with-endorsements", false, "put the vendors' endorsements into the evidence, asking them for what the machine does not have")
	from.add(cmd)
	return cmd
}

func collect(ctx context.Context, opts kinds.IssuerOptions, pcrs []uint32) (*attestv1.Saved, []kinds.Finding, error) {
	issuers, findings, err := kinds.All().Issuers(ctx, opts)
	switch {
	case errors.Is(err, attestation.ErrNoDevice):
		return nil, nil, failure.New(failure.NoDevice, err, "is the driver loaded? name a TPM with --device")
	case err != nil:
		return nil, nil, failure.New(failure.Usage, err, "")
	}
	s, err := saved.Collect(ctx, issuers, pcrs)
	if errors.Is(err, attestation.ErrNoDevice) {
		return nil, nil, failure.New(failure.NoDevice, err, "is the driver loaded? name a TPM with --device")
	}
	return s, findings, err
}

// shownEvidence is what evidence prints.
type shownEvidence struct {
	Findings []kinds.Finding                    `json:"findings,omitempty"`
	Evidence map[attestation.Kind]kinds.Summary `json:"evidence"`
	order    []attestation.Kind
}

func show(s *attestv1.Saved) (*shownEvidence, error) {
	out := &shownEvidence{Evidence: map[attestation.Kind]kinds.Summary{}, order: saved.Kinds(s)}
	for _, k := range out.order {
		var err error
		if out.Evidence[k], err = kinds.All().Summarize(s, k); err != nil {
			return nil, failure.New(failure.EvidenceRefused, err, "")
		}
	}
	return out, nil
}

func (s *shownEvidence) print(w io.Writer) {
	for _, f := range s.Findings {
		fmt.Fprintln(w, f)
	}
	for _, k := range s.order {
		fmt.Fprintf(w, "\n%s evidence\n", k)
		s.Evidence[k].Print(w)
	}
}

func newEndorsements() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "endorsements",
		Short: "Fetch what vendors say of hardware beforehand",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var from endorsementFlags
	var product string
	fetch := &cobra.Command{
		Use:   "fetch FILE...",
		Short: "Fetch the endorsements of saved evidence into a folder",
		Long: `Fetch the endorsements of saved evidence into a folder: the certificates,
revocation lists and TCB levels that a verifier of such machines needs.

For a site without a way to the vendors, save evidence of its machines there
("keyagent evidence --file"), fetch on a machine that reaches them, and take the
folder back: it is "endorsements: cache:" of agents or of the key service, with
"ask: [none]". Revocation lists and TCB levels expire; fetch again before.`,
		Example: "  keyagent endorsements fetch --cache /media/endorsements evidence-*.json",
		Args:    cobra.MinimumNArgs(1),
	}
	output := outputFlag(fetch)
	fetch.RunE = func(cmd *cobra.Command, args []string) error {
		if from.cfg.Cache == "" {
			return failure.Newf(failure.Usage, "for example --cache /media/endorsements", "no folder to keep endorsements in")
		}
		source, err := from.open("amd", "intel")
		if err != nil {
			return err
		}
		defer source.Close()
		result, err := fetchAll(cmd.Context(), source, args, product)
		if err != nil {
			return err
		}
		return print(cmd, *output, result, func(w io.Writer) {
			for _, name := range result.Fetched {
				fmt.Fprintln(w, name)
			}
			fmt.Fprintf(w, "%d endorsements are in %s\n", len(result.Fetched), from.cfg.Cache)
		})
	}
	from.add(fetch)
	fetch.Flags().StringVar(&product, "product", "", "product of SNP reports of version 2, which do not name it: Milan or Genoa")
	cmd.AddCommand(fetch)
	return cmd
}

type fetched struct {
	Fetched []string `json:"fetched"`
}

// unfetchable says what to do about evidence that does not say whose endorsements it
// needs.
func unfetchable(err error) string {
	switch {
	case errors.Is(err, snp.ErrProduct):
		return "an SNP report of version 2 needs --product"
	case errors.Is(err, snp.ErrChip):
		return "AMD finds a certificate by its chip ID: have the host unmask it (MASK_CHIP_ID off), or take the certificate that the host itself hands over"
	}
	return ""
}

func fetchAll(ctx context.Context, source endorsement.Source, files []string, product string) (*fetched, error) {
	out := &fetched{}
	for _, path := range files {
		s, err := evidence.Read(path)
		if err != nil {
			return nil, err
		}
		requests, err := kinds.All().EndorsementRequests(s, product)
		if err != nil {
			return nil, failure.New(failure.Usage, fmt.Errorf("%s: %w", path, err), unfetchable(err))
		}
		for _, r := range requests {
			if slices.Contains(out.Fetched, r.Name) {
				continue
			}
			if _, err := source.Get(ctx, r); err != nil {
				return nil, failure.New(failure.Unreachable, fmt.Errorf("%s: %w", r.Name, err), "--mirror names another place to ask")
			}
			out.Fetched = append(out.Fetched, r.Name)
		}
	}
	return out, nil
}
