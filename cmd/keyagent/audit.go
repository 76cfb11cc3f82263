//go:build !keyagent_node

package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
)

func newAudit() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Verify and read the audit log",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newAuditVerify())
	return cmd
}

func newAuditVerify() *cobra.Command {
	var head string
	var show bool
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Prove that no entry was changed, removed or moved",
		Long: `Prove that no entry was changed, removed or moved.

A log that was cut at its end is whole in itself. Keep the head that this prints
elsewhere, and give it with --head the next time: the log must then contain it.`,
		Example: `  keyagent audit verify /var/lib/keyagent/audit.log
  keyagent audit verify --head 5f3c… --show /var/lib/keyagent/audit.log`,
		Args: cobra.ExactArgs(1),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		f, err := os.Open(args[0])
		if err != nil {
			return failure.New(failure.Usage, err, "")
		}
		defer f.Close()
		seen := head == ""
		visit := func(e audit.Entry) {
			seen = seen || e.Prev == head
			if show {
				fmt.Fprintf(cmd.OutOrStdout(), "%d %s %s %s %s volume=%s identity=%s %s\n", e.Seq, e.Time.Format(time.RFC3339),
					e.Result, e.Event, e.CorrelationID, dash(e.Volume), dash(e.Identity), e.Detail)
			}
		}
		h, err := audit.Verify(f, visit)
		if err != nil {
			return failure.New(failure.Tampered, err, "compare with a copy of the log that was kept elsewhere")
		}
		if !seen && h.Hash != head {
			return failure.Newf(failure.Tampered, "the log was cut, or is another one", "the log of %d entries does not contain the head %s", h.Entries, head)
		}
		return print(cmd, *output, h, func(w io.Writer) {
			fmt.Fprintf(w, "the log is whole: %d entries, head %s\n", h.Entries, h.Hash)
		})
	}
	cmd.Flags().StringVar(&head, "head", "", "a head that the log must contain")
	cmd.Flags().BoolVar(&show, "show", false, "print each entry")
	return cmd
}
