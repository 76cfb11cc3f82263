//go:build !keyagent_node

package main

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/checkpoint"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyservice"
)

func newAudit() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Verify and read the audit log",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newAuditVerify(), newAuditCheckpoint())
	return cmd
}

func newAuditVerify() *cobra.Command {
	var head, note, key, entry string
	var show bool
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Prove that no entry was changed, removed or moved",
		Long: `Prove that no entry was changed, removed or moved.

A log that was cut at its end is whole in itself. Keep a checkpoint of it elsewhere, as
keyagent audit checkpoint prints it and each node has one (keyagent witness), and give
it with --checkpoint the next time: the log must then continue what it was. --head does
the same with the head that this prints, which nobody signs.

With --entry too it proves that one entry is among those that the checkpoint covers.`,
		Example: `  keyagent audit verify /var/lib/keyagent/audit.log
  keyagent audit verify --checkpoint kept.note --key "$(cat kept.key)" /var/lib/keyagent/audit.log
  keyagent audit verify --head 5f3c… --show /var/lib/keyagent/audit.log`,
		Args: cobra.ExactArgs(1),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		kept, err := readCheckpoint(note, key)
		if err != nil {
			return err
		}
		f, err := os.Open(args[0])
		if err != nil {
			return failure.New(failure.Usage, err, "")
		}
		defer f.Close()
		seen, number := head == "", uint64(0)
		visit := func(e audit.Entry) {
			seen = seen || e.Prev == head
			if entry != "" && e.CorrelationID == entry && number == 0 {
				number = e.Seq
			}
			if show {
				fmt.Fprintf(cmd.OutOrStdout(), "%d %s %s %s %s volume=%s identity=%s %s\n", e.Seq, e.Time.Format(time.RFC3339),
					e.Result, e.Event, e.CorrelationID, dash(e.Volume), dash(e.Identity), e.Detail)
			}
		}
		h, err := audit.Verify(f, visit)
		if err != nil {
			return failure.New(failure.Tampered, err, "compare with a copy of the log that was kept elsewhere")
		}
		if kept != nil {
			if err := kept.holds(h); err != nil {
				return err
			}
		}
		switch {
		case entry != "" && number == 0:
			return failure.Newf(failure.NotFound, "it is the correlation ID of an answer or of a refusal", "the log has no entry %q", entry)
		case entry != "" && kept != nil && number > uint64(kept.Size):
			return failure.Newf(failure.State, "a later checkpoint covers it", "entry %d came after the checkpoint of %d entries", number, kept.Size)
		}
		if !seen && h.Hash != head {
			return failure.Newf(failure.Tampered, "the log was cut, or is another one", "the log of %d entries does not contain the head %s", h.Entries, head)
		}
		return print(cmd, *output, h, func(w io.Writer) {
			fmt.Fprintf(w, "the log is whole: %d entries, head %s\n", h.Entries, h.Hash)
			if kept != nil {
				fmt.Fprintf(w, "it continues the checkpoint of %d entries\n", kept.Size)
			}
			if number > 0 {
				fmt.Fprintf(w, "%s is entry %d\n", entry, number)
			}
		})
	}
	cmd.Flags().StringVar(&note, "checkpoint", "", "file with a checkpoint that the log must continue")
	cmd.Flags().StringVar(&key, "key", "", "key that signed the checkpoint, as keyagent audit checkpoint and keyagent witness print it")
	cmd.Flags().StringVar(&entry, "entry", "", "correlation ID of an entry that must be there, and be covered by the checkpoint")
	cmd.Flags().StringVar(&head, "head", "", "a head that the log must contain")
	cmd.Flags().BoolVar(&show, "show", false, "print each entry")
	return cmd
}

// keptCheckpoint is one that was kept elsewhere.
type keptCheckpoint struct {
	*checkpoint.Signed
	key ed25519.PublicKey
}

func readCheckpoint(path, key string) (*keptCheckpoint, error) {
	switch {
	case path == "" && key == "":
		return nil, nil
	case path == "" || key == "":
		return nil, failure.Newf(failure.Usage, "anybody can write a checkpoint: its key says whose it is", "--checkpoint and --key go together")
	}
	id, public, err := checkpoint.ParseVerifierKey(key)
	if err != nil {
		return nil, failure.New(failure.Usage, fmt.Errorf("--key: %w", err), "keyagent-audit-…+…+…, in quotes")
	}
	data, err := config.ReadPublicFile(path, checkpoint.MaxNote)
	if err != nil {
		return nil, failure.New(failure.Usage, err, "")
	}
	c, err := checkpoint.Parse(public, data)
	if err == nil && c.Log != id {
		err = checkpoint.ErrSignature
	}
	if err != nil {
		return nil, failure.New(failure.Tampered, fmt.Errorf("%s: %w", path, err), "")
	}
	return &keptCheckpoint{c, public}, nil
}

// holds says whether a log continues what it was.
func (k *keptCheckpoint) holds(w *audit.Whole) error {
	const hint = "the log was cut, changed, or is another one"
	if id := checkpoint.LogID(k.key, w.First); id != k.Log {
		return failure.Newf(failure.Tampered, hint, "the checkpoint is of the log %s, and this is %s", k.Log, id)
	}
	now := checkpoint.Checkpoint{Log: k.Log, Size: int64(w.Entries)}
	if k.Size > now.Size {
		return failure.Newf(failure.Tampered, hint, "the checkpoint has %d entries, and the log %d", k.Size, now.Size)
	}
	root, err := w.Root(k.Size)
	if err != nil {
		return err
	}
	if root != k.Root {
		return failure.Newf(failure.Tampered, hint, "the checkpoint has the root %s over %d entries, and the log %s", k.Root, k.Size, root)
	}
	return nil
}

func newAuditCheckpoint() *cobra.Command {
	cmd := &cobra.Command{
		Use: "checkpoint", Short: "Print a signed checkpoint of the log, to be kept elsewhere",
		Long: `Print a checkpoint of the audit log of the key service that runs: how many entries it
has, and the root of the Merkle tree over them, signed by the log's key, which follows.

It is a signed note (https://c2sp.org/tlog-checkpoint). Keep it out of reach of those who can
change the log: keyagent audit verify --checkpoint later proves that the log continues it.`,
		Example: "  keyagent audit checkpoint >kept.note\n  keyagent audit checkpoint --output json",
		Args:    cobra.NoArgs,
	}
	var f adminFlags
	f.add(cmd)
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return f.with(cmd.Context(), func(ctx context.Context, c *keyservice.AdminClient) error {
			now, err := c.Checkpoint(ctx)
			if err != nil {
				return err
			}
			if *output == "text" {
				fmt.Fprintln(cmd.ErrOrStderr(), "key:", now.Key)
			}
			return print(cmd, *output, now, func(w io.Writer) { fmt.Fprint(w, now.Note) })
		})
	}
	return cmd
}
