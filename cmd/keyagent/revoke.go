//go:build !keyagent_node

package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyservice"
	"github.com/keyagent/keyagent/internal/revocation"
)

func newRevoke() *cobra.Command {
	cmd := &cobra.Command{
		Use: "revoke", Short: "Have a machine, or a volume, get no keys any more",
		Long: `Have a machine, or a volume, get no keys any more, whatever the policy says.

A machine is named by its identity, as the audit log and keyagent volume show have it. It
gets no key from now on, and what it has open is suspended at its next renewal, or as
on_revoke of its volumes says; --lift has it go on. A machine that is no longer yours obeys
nobody: what it can read now, it can read later.

Other key services over the same storage follow within seconds.`,
		Example: "  keyagent revoke --node tpm:af26… --reason \"stolen\"\n  keyagent revoke --volume data-1\n  keyagent revoke --volume data-1 --lift\n  keyagent revoke --list",
		Args:    cobra.NoArgs,
	}
	var f adminFlags
	f.add(cmd)
	output := outputFlag(cmd)
	flags := cmd.Flags()
	node := flags.String("node", "", "identity of the machine")
	volume := flags.String("volume", "", "ID of the volume")
	reason := flags.String("reason", "", "why, for the audit log and --list")
	lift := flags.Bool("lift", false, "take it back")
	list := flags.Bool("list", false, "show what is revoked")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		said := 0
		for _, f := range []string{"node", "volume", "list"} {
			if flags.Changed(f) {
				said++
			}
		}
		if said != 1 || *list && (*lift || *reason != "") {
			return failure.Newf(failure.Usage, "see keyagent revoke --help", "one of --node, --volume and --list says what is meant")
		}
		return f.with(cmd.Context(), func(ctx context.Context, c *keyservice.AdminClient) error {
			if *list {
				all, err := c.Revocations(ctx)
				if err != nil {
					return err
				}
				return print(cmd, *output, all, func(w io.Writer) { printRevocations(w, all) })
			}
			subject := revocation.Subject{Kind: revocation.Node, Name: *node}
			if flags.Changed("volume") {
				subject = revocation.Subject{Kind: revocation.Volume, Name: *volume}
			}
			if err := subject.Validate(); err != nil {
				return failure.New(failure.Usage, err, "name one identity, as keyagent volume show and the audit log have it: tpm: and nitro: are of one machine, snp: and tdx: of a processor on which others may run")
			}
			word, err := c.Revoke(ctx, subject, *reason, *lift)
			if err != nil {
				return err
			}
			return print(cmd, *output, word, func(w io.Writer) {
				if *lift {
					fmt.Fprintf(w, "%s is not revoked any more\n", subject)
					return
				}
				fmt.Fprintf(w, "%s is revoked\n", subject)
			})
		})
	}
	return cmd
}

func printRevocations(w io.Writer, all []revocation.Word) {
	if len(all) == 0 {
		fmt.Fprintln(w, "nothing is revoked")
	}
	for _, r := range all {
		fmt.Fprintf(w, "%s  since %s by %s", r.Subject, r.At.Format(time.RFC3339), r.By)
		if r.Reason != "" {
			fmt.Fprintf(w, ": %s", r.Reason)
		}
		fmt.Fprintln(w)
	}
}
