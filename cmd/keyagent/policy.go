//go:build !keyagent_node

package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
)

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
		p, err := kinds.LoadPolicy(args[0])
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
	Allowed  []string       `json:"allowed,omitempty"` // what profiles leave open or accept by name
	AnyTPM   []string       `json:"any_tpm,omitempty"` // profiles that a whole root vouches for
	Advice   []string       `json:"advice,omitempty"`
	Grants   []policy.Grant `json:"grants"`
	Replicas []string       `json:"replicas,omitempty"` // profiles that may receive the master secret
}

func summarize(p *policy.Policy) policySummary {
	s := policySummary{SHA256: p.Hash(), Lifetime: p.Lifetime().String(), PCRs: p.PCRs(), Grants: p.Grants(), Replicas: p.Replicas(), Advice: p.Advice()}
	for _, pr := range p.Profiles() {
		s.Profiles = append(s.Profiles, pr.Name)
		s.WarnOnly = append(s.WarnOnly, pr.WarnOnly()...)
		s.Allowed = append(s.Allowed, pr.Allowed()...)
		if t := pr.TPM(); t != nil && slices.ContainsFunc(t.Trust, func(t string) bool { return strings.HasPrefix(t, "root:") }) {
			s.AnyTPM = append(s.AnyTPM, pr.Name)
		}
	}
	return s
}

func (s policySummary) print(w io.Writer) {
	fmt.Fprintf(w, "the policy is good (sha256 %s)\n", s.SHA256)
	quoted := ""
	if len(s.PCRs) > 0 {
		quoted = fmt.Sprintf("PCRs quoted: %v; ", s.PCRs)
	}
	fmt.Fprintf(w, "profiles: %s; %sa verdict holds for %s\n", strings.Join(s.Profiles, ", "), quoted, s.Lifetime)
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
		if o := g.Offline; o != nil {
			fmt.Fprintf(w, "  and keep their keys in the TPM for an outage: for %s and %d boots, in which no revocation reaches them\n", o.For, o.Boots)
		}
	}
	if len(s.Replicas) > 0 {
		fmt.Fprintf(w, "replicas: profiles %s may be key services, and receive the master secret\n", strings.Join(s.Replicas, ", "))
	}
	for _, p := range s.AnyTPM {
		fmt.Fprintf(w, "NOTE: profile %q believes every TPM under its root; anyone with such a TPM of their own can imitate a machine (docs/LIMITATIONS.md)\n", p)
	}
	for _, a := range s.Allowed {
		fmt.Fprintf(w, "NOTE: %s\n", a)
	}
	for _, a := range s.Advice {
		fmt.Fprintf(w, "NOTE: %s\n", a)
	}
	for _, f := range s.WarnOnly {
		fmt.Fprintf(w, "WARNING: %s is warn_only: a machine that differs there still gets keys\n", f)
	}
}
