package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/internal/failure"
)

func newVerify() *cobra.Command {
	var policyPath, at string
	var from endorsementFlags
	var fetch bool
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Appraise saved evidence against a policy and explain each mismatch",
		Long: `Appraise saved evidence against a policy and explain each mismatch.

FILE is what "keyagent evidence --file" wrote, or an SNP report or a TDX quote as
other tools save them, in bytes or hex. Signatures, certificate chains and reference
values are checked as the key service checks them. Freshness is not: a file holds its
own challenge.

Endorsements that the file does not carry are taken from --cache. Nobody is asked
for them unless --fetch says so.`,
		Example: `  keyagent verify --policy policy.yaml evidence.json
  keyagent verify --policy policy.yaml --fetch report.bin`,
		Args: cobra.ExactArgs(1),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := kinds.LoadPolicy(policyPath)
		if err != nil {
			hint := "docs/configuration.md describes the file"
			if errors.Is(err, fs.ErrNotExist) {
				hint = "name the policy with --policy"
			}
			return failure.New(failure.Configuration, err, hint)
		}
		file, err := readEvidence(args[0])
		if err != nil {
			return err
		}
		now := time.Now()
		if at != "" {
			if now, err = time.Parse(time.RFC3339, at); err != nil {
				return failure.New(failure.Usage, err, "for example --at 2026-01-02T15:04:05Z")
			}
		}
		var ask []string
		if fetch {
			ask = []string{"amd", "intel"}
		}
		source, err := from.open(ask...)
		if err != nil {
			return err
		}
		defer source.Close()
		opts := kinds.VerifierOptions{Policy: func() *policy.Policy { return p }, Endorsements: source, Now: func() time.Time { return now }}
		result, err := verifySaved(cmd.Context(), opts, file, now)
		if result != nil {
			if printErr := print(cmd, *output, result, result.print); printErr != nil {
				return printErr
			}
		}
		return err
	}
	cmd.Flags().StringVar(&policyPath, "policy", "policy.yaml", "policy file")
	cmd.Flags().StringVar(&at, "at", "", "verify as of this time (RFC 3339)")
	cmd.Flags().BoolVar(&fetch, "fetch", false, "ask the vendors for endorsements that are missing")
	from.add(cmd)
	return cmd
}

// readEvidence reads a file of our own, or a report or quote as it is.
func readEvidence(path string) (*attestv1.Saved, error) {
	data, err := readBounded(path, saved.MaxFile)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		return parseSaved(path, data)
	}
	s, err := kinds.Import(data)
	if err != nil {
		return nil, failure.New(failure.Usage, fmt.Errorf("%s is neither a file of evidence nor an SNP report or a TDX quote, in bytes or hex: %w", path, err),
			"keyagent evidence --file FILE makes one")
	}
	return s, nil
}

// verdict is what verify prints.
type verdict struct {
	Accepted   bool              `json:"accepted"`
	Identity   string            `json:"identity"`
	Trust      string            `json:"trust"`
	Proved     []proved          `json:"proved"`
	Profile    string            `json:"profile"`
	Mismatches []policy.Mismatch `json:"mismatches,omitempty"`
	Warnings   []policy.Mismatch `json:"warnings,omitempty"`
}

// proved is who one kind of claims is of, and who vouches.
type proved struct {
	Kind     attestation.Kind `json:"kind"`
	Via      attestation.Kind `json:"via,omitempty"`
	Identity string           `json:"identity"`
	Trust    string           `json:"trust,omitempty"`
}

func (p proved) String() string {
	who := fmt.Sprintf("%s %s", kindName(p.Kind), p.Identity)
	if p.Trust != "" {
		who += ", vouched for by " + p.Trust
	}
	return who
}

func kindName(k attestation.Kind) string {
	if k == attestation.Azure || k == attestation.Nitro {
		return string(k)
	}
	return strings.ToUpper(string(k))
}

func verifySaved(ctx context.Context, opts kinds.VerifierOptions, s *attestv1.Saved, now time.Time) (*verdict, error) {
	refused := func(err error) error {
		hint := ""
		if errors.Is(err, attestation.ErrUnendorsed) {
			hint = "--fetch asks the vendors, --cache names a folder that keyagent endorsements fetch filled"
		}
		return failure.New(failure.EvidenceRefused, err, hint)
	}
	if err := saved.Check(s); err != nil {
		return nil, refused(err)
	}
	demanded, err := opts.Policy().Demand(saved.Kinds(s))
	if err != nil {
		return nil, refused(err)
	}
	verifiers, err := kinds.All().Verifiers(opts)
	if err != nil {
		return nil, err
	}
	verifiers = slices.DeleteFunc(verifiers, func(v attestation.Verifier) bool { return !slices.Contains(demanded, v.Kind()) })
	claims, err := saved.Verify(ctx, verifiers, s)
	if err != nil {
		return nil, refused(err)
	}
	verified, err := attestation.NewVerified(attestation.Binder(s.GetBinder()), now, claims...)
	if err != nil {
		return nil, err
	}
	out := &verdict{Identity: claims[0].Identity, Trust: claims[0].Trust}
	for _, c := range claims {
		out.Proved = append(out.Proved, proved{c.Kind, c.Via, c.Identity, c.Trust})
	}
	a, err := opts.Policy().Appraise(verified)
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
	who := make([]string, len(v.Proved))
	for n, p := range v.Proved {
		who[n] = p.String()
	}
	if v.Accepted {
		fmt.Fprintf(w, "accepted: %s, fits profile %q\n", strings.Join(who, "; "), v.Profile)
	} else {
		fmt.Fprintf(w, "refused: %s, fits no profile; closest is %q\n", strings.Join(who, "; "), v.Profile)
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
