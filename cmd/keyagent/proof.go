package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyservice"
)

// maxSaved bounds a file of evidence in bytes.
const maxSaved = 4 << 20

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

func newEvidence() *cobra.Command {
	var opts tpm.IssuerOptions
	var ek, pcrs, file string
	cmd := &cobra.Command{
		Use:   "evidence",
		Short: "Collect what this machine can prove",
		Long: `Collect what this machine can prove, and show it. With --file it is saved, for
"keyagent verify" on another machine. Saved evidence is not fresh: it answers a
question that the machine asked itself.`,
		Example: `  keyagent evidence
  keyagent evidence --file evidence.json`,
		Args: cobra.NoArgs,
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		list, err := parsePCRs(pcrs)
		if err != nil {
			return err
		}
		opts.EK = tpm.EKType(ek)
		issuer, err := tpm.NewIssuer(opts)
		if err != nil {
			return failure.New(failure.Usage, err, "")
		}
		saved, err := tpm.Collect(cmd.Context(), issuer, list)
		if err != nil {
			return deviceError(err)
		}
		if file != "" {
			data, err := protojson.MarshalOptions{Multiline: true}.Marshal(saved)
			if err != nil {
				return err
			}
			if err := os.WriteFile(file, append(data, '\n'), 0o644); err != nil {
				return failure.New(failure.Usage, err, "")
			}
		}
		summary, err := tpm.Summarize(saved)
		if err != nil {
			return err
		}
		return print(cmd, *output, summary, func(w io.Writer) { summary.Print(w) })
	}
	f := cmd.Flags()
	f.StringVar(&opts.Device, "device", tpm.DefaultDevice, "TPM device, or unix:PATH of a software TPM")
	f.StringVar(&ek, "ek", string(tpm.EKAuto), "endorsement key: auto, rsa-2048 or ecc-p384")
	f.StringVar(&opts.EventLog, "event-log", tpm.DefaultEventLog, "the firmware's event log")
	f.StringVar(&pcrs, "pcrs", "0-7,11", "PCRs to quote")
	f.StringVar(&file, "file", "", "save the evidence to this file")
	return cmd
}

func deviceError(err error) error {
	if errors.Is(err, attestation.ErrNoDevice) {
		return failure.New(failure.NoDevice, err, "is the TPM's driver loaded? name the device with --device")
	}
	return err
}

func readSaved(path string) (*attestv1.Saved, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, failure.New(failure.Usage, err, "keyagent evidence --file FILE makes one")
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSaved+1))
	if err != nil {
		return nil, err
	}
	saved := &attestv1.Saved{}
	if len(data) > maxSaved || protojson.Unmarshal(data, saved) != nil {
		return nil, failure.Newf(failure.Usage, "keyagent evidence --file FILE makes one", "%s is not a file of evidence", path)
	}
	return saved, nil
}

func newVerify() *cobra.Command {
	var policyPath, at string
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Appraise saved evidence against a policy and explain each mismatch",
		Long: `Appraise saved evidence against a policy and explain each mismatch.

Signatures, certificate chains and reference values are checked as the key
service checks them. Freshness is not: the file holds its own challenge.`,
		Example: "  keyagent verify --policy policy.yaml evidence.json",
		Args:    cobra.ExactArgs(1),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := policy.Load(policyPath)
		if err != nil {
			return failure.New(failure.Configuration, err, "keyagent policy check says what is wrong")
		}
		saved, err := readSaved(args[0])
		if err != nil {
			return err
		}
		now := time.Now()
		if at != "" {
			if now, err = time.Parse(time.RFC3339, at); err != nil {
				return failure.New(failure.Usage, err, "for example --at 2026-01-02T15:04:05Z")
			}
		}
		v, err := tpm.NewVerifier(tpm.VerifierOptions{
			Trust: func() tpm.Trust { return keyservice.TPMTrust(p) },
			Now:   func() time.Time { return now },
		})
		if err != nil {
			return err
		}
		result, err := verifySaved(cmd, p, v, saved, now)
		if result != nil {
			if printErr := print(cmd, *output, result, result.print); printErr != nil {
				return printErr
			}
		}
		return err
	}
	cmd.Flags().StringVar(&policyPath, "policy", "policy.yaml", "policy file")
	cmd.Flags().StringVar(&at, "at", "", "verify as of this time (RFC 3339)")
	return cmd
}

// verdict is what verify prints.
type verdict struct {
	Accepted   bool              `json:"accepted"`
	Identity   string            `json:"identity"`
	Trust      string            `json:"trust"`
	Profile    string            `json:"profile"`
	Mismatches []policy.Mismatch `json:"mismatches,omitempty"`
	Warnings   []policy.Mismatch `json:"warnings,omitempty"`
}

func verifySaved(cmd *cobra.Command, p *policy.Policy, v *tpm.Verifier, saved *attestv1.Saved, now time.Time) (*verdict, error) {
	claims, err := v.VerifySaved(cmd.Context(), saved)
	if err != nil {
		return nil, failure.New(failure.EvidenceRefused, err, "")
	}
	verified, err := attestation.NewVerified(attestation.Binder(saved.GetBinder()), now, claims...)
	if err != nil {
		return nil, err
	}
	out := &verdict{Identity: claims[0].Identity, Trust: claims[0].Trust}
	a, err := p.Appraise(verified)
	if err != nil {
		var m *policy.MismatchError
		if errors.As(err, &m) {
			out.Profile, out.Mismatches = m.Profile, m.Mismatches
		}
		return out, failure.New(failure.EvidenceRefused, policy.ErrMismatch, "keyagent measure makes reference values of a machine that is trusted")
	}
	out.Accepted, out.Profile, out.Warnings = true, a.Profile, a.Warnings
	return out, nil
}

func (v *verdict) print(w io.Writer) {
	if v.Accepted {
		fmt.Fprintf(w, "accepted: TPM %s, vouched for by %s, fits profile %q\n", v.Identity, v.Trust, v.Profile)
	} else {
		fmt.Fprintf(w, "refused: TPM %s, vouched for by %s, fits no profile; closest is %q\n", v.Identity, v.Trust, v.Profile)
	}
	printMismatches(w, "mismatch", v.Mismatches)
	printMismatches(w, "warning", v.Warnings)
}

func printMismatches(w io.Writer, kind string, all []policy.Mismatch) {
	for _, m := range all {
		fmt.Fprintf(w, "%s: %s\n  expected %s\n  found    %s\n", kind, m.Field, strings.Join(m.Expected, "\n        or "), m.Found)
		for _, e := range m.Events {
			fmt.Fprintf(w, "  %s\n", e)
			if e.Detail != "" {
				fmt.Fprintf(w, "    the log says: %s\n", e.Detail)
			}
		}
	}
}

func newPolicy() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Check policies",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	check := &cobra.Command{
		Use:     "check FILE",
		Short:   "Say whether a policy is good, and what it allows",
		Example: "  keyagent policy check policy.yaml",
		Args:    cobra.ExactArgs(1),
	}
	output := outputFlag(check)
	check.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := policy.Load(args[0])
		if err != nil {
			hint := ""
			if errors.Is(err, config.ErrInvalid) {
				hint = "docs/configuration.md describes the policy file"
			}
			return failure.New(failure.Configuration, err, hint)
		}
		summary := summarize(p)
		return print(cmd, *output, summary, summary.print)
	}
	cmd.AddCommand(check)
	return cmd
}

type policySummary struct {
	SHA256   string         `json:"sha256"`
	Lifetime string         `json:"lifetime"`
	PCRs     []uint32       `json:"pcrs"`
	Profiles []string       `json:"profiles"`
	WarnOnly []string       `json:"warn_only,omitempty"`
	AnyTPM   []string       `json:"any_tpm,omitempty"` // profiles that a whole root vouches for
	Grants   []policy.Grant `json:"grants"`
}

func summarize(p *policy.Policy) policySummary {
	s := policySummary{SHA256: p.Hash(), Lifetime: p.Lifetime().String(), PCRs: p.PCRs(), Grants: p.Grants()}
	for _, pr := range p.Profiles() {
		s.Profiles = append(s.Profiles, pr.Name)
		if slices.ContainsFunc(pr.TPM.Trust, func(t string) bool { return strings.HasPrefix(t, "root:") }) {
			s.AnyTPM = append(s.AnyTPM, pr.Name)
		}
		for _, r := range pr.TPM.PCRs {
			if r.WarnOnly {
				s.WarnOnly = append(s.WarnOnly, fmt.Sprintf("%s pcr%d", pr.Name, *r.PCR))
			}
		}
	}
	return s
}

func (s policySummary) print(w io.Writer) {
	fmt.Fprintf(w, "the policy is good (sha256 %s)\n", s.SHA256)
	fmt.Fprintf(w, "profiles: %s; PCRs quoted: %v; a verdict holds for %s\n", strings.Join(s.Profiles, ", "), s.PCRs, s.Lifetime)
	for _, g := range s.Grants {
		ops := make([]string, len(g.Operations))
		for i, o := range g.Operations {
			ops[i] = string(o)
		}
		fmt.Fprintf(w, "grant %q: profiles %s may %s volumes %s", g.Name, strings.Join(g.Profiles, ", "), strings.Join(ops, " and "), strings.Join(g.Volumes, ", "))
		if g.When != "" {
			fmt.Fprintf(w, " when %s", g.When)
		}
		fmt.Fprintln(w)
	}
	for _, p := range s.AnyTPM {
		fmt.Fprintf(w, "NOTE: profile %q believes every TPM under its root; whoever has one to himself can imitate a machine (docs/LIMITATIONS.md)\n", p)
	}
	for _, f := range s.WarnOnly {
		fmt.Fprintf(w, "WARNING: %s is warn_only: a machine that differs there still gets keys\n", f)
	}
}

// hexOf is for output.
func hexOf(b []byte) string { return hex.EncodeToString(b) }
