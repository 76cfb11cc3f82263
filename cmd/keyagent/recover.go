//go:build !keyagent_node

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyservice"
	"github.com/keyagent/keyagent/internal/recovery"
)

func newRecover() *cobra.Command {
	cmd := &cobra.Command{
		Use: "recover", Short: "Get the key of one volume when nothing else opens it",
		Long: `Get the key of one volume when nothing else opens it.

A request names the volume, the reason, a time, and who receives the key. As many operators as
the key service's configuration says (recovery:) sign it with their SSH keys, and then the key
leaves once, encrypted to the recipient. The audit log has all of it before. It is off unless
it is configured.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newRecoverRequest(), newRecoverCollect())
	return cmd
}

func newRecoverRequest() *cobra.Command {
	cmd := &cobra.Command{
		Use: "request VOLUME FILE", Short: "Make a request, for operators to approve",
		Long: `Make a request, for operators to approve.

Each who approves it reads FILE, and signs it: ssh-keygen -Y sign -n keyagent-recovery -f KEY FILE.`,
		Example: "  keyagent recover request data-1 request.json --reason 'read the disk elsewhere, case 7' --to age1…",
		Args:    cobra.ExactArgs(2),
	}
	var f adminFlags
	f.add(cmd)
	reason := cmd.Flags().String("reason", "", "why, on one line")
	to := cmd.Flags().String("to", "", "age recipient or SSH public key of who receives the key")
	window := cmd.Flags().Duration("for", 4*time.Hour, "how long it may be collected, 24h at most")
	version := cmd.Flags().Uint32("key-version", 0, "another key than the one in use: the next one, while the key is being changed")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *reason == "" || *to == "" {
			return failure.Newf(failure.Usage, "see keyagent recover request --help", "--reason and --to must be given")
		}
		return f.with(cmd.Context(), func(ctx context.Context, c *keyservice.AdminClient) error {
			data, err := c.RecoverRequest(ctx, args[0], *reason, *to, *version, *window)
			if err != nil {
				return err
			}
			if err := writeNew(args[1], data); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is to be signed: ssh-keygen -Y sign -n %s -f KEY %s\n", args[1], recovery.Namespace, filepath.Base(args[1]))
			return nil
		})
	}
	return cmd
}

func newRecoverCollect() *cobra.Command {
	cmd := &cobra.Command{
		Use: "collect FILE", Short: "Collect the key of a request that is approved",
		Long: `Collect the key of a request that is approved, once.

What is written is encrypted to the request's recipient. age -d gives the passphrase of the LUKS2
keyslot as it is, for cryptsetup's --key-file=-. The header on the disk is the host's to change:
compare it with a backup before you open the disk with cryptsetup.`,
		Example: "  keyagent recover collect request.json --approval alice.sig --approval bob.sig --out data-1.key.age",
		Args:    cobra.ExactArgs(1),
	}
	var f adminFlags
	f.add(cmd)
	approvals := cmd.Flags().StringArray("approval", nil, "signature of an operator; may be repeated")
	out := cmd.Flags().String("out", "", "file that is written")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *out == "" || len(*approvals) == 0 {
			return failure.Newf(failure.Usage, "see keyagent recover collect --help", "--approval and --out must be given")
		}
		request, err := config.ReadPublicFile(args[0], recovery.MaxRequest)
		if err != nil {
			return failure.New(failure.Configuration, err, "")
		}
		var signatures [][]byte
		for _, path := range *approvals {
			sig, err := config.ReadPublicFile(path, recovery.MaxSignature)
			if err != nil {
				return failure.New(failure.Configuration, err, "")
			}
			signatures = append(signatures, sig)
		}
		// A request is answered once: what is to be written is there before.
		to, err := os.OpenFile(*out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			return exists(*out)
		}
		if err != nil {
			return failure.New(failure.Configuration, err, "")
		}
		err = f.with(cmd.Context(), func(ctx context.Context, c *keyservice.AdminClient) error {
			data, err := c.Recover(ctx, request, signatures)
			if err == nil {
				_, err = to.Write(data)
			}
			return err
		})
		if err = errors.Join(err, to.Sync(), to.Close()); err != nil {
			return errors.Join(err, os.Remove(*out))
		}
		return nil
	}
	return cmd
}
