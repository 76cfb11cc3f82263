//go:build !keyagent_node

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/evidence"
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
		file, err := evidence.Read(args[0])
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
		result, err := evidence.Appraise(cmd.Context(), opts, file, now)
		if result != nil {
			if printErr := print(cmd, *output, result, func(w io.Writer) { printVerdict(w, result) }); printErr != nil {
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

func printVerdict(w io.Writer, v *evidence.Verdict) {
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
