//go:build !keyagent_node

package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/failure"
)

func newKubeKMSRotate() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Add a new KEK to a file of wrapped KEKs",
		Long: `Add a new KEK to a file of wrapped KEKs.

Plugins that read the file decrypt with the new KEK from their next fetch on, and
encrypt with it after the observations that they need. Copies of the file on other
control-plane nodes must be replaced within one fetch of it. The older KEKs stay in
the file: keyagent kubekms rotation-plan says when they may go.`,
		Example: `  keyagent kubekms rotate --kms 'kms://aws?keyName=alias/etcd' --wrapped-kek /var/lib/keyagent/kek.json`,
		Args:    cobra.NoArgs,
	}
	var f wrappedFlags
	f.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		file, err := f.open(cmd.Context())
		if err != nil {
			return err
		}
		version, err := file.Rotate(cmd.Context())
		if err := errors.Join(err, file.Close()); err != nil {
			return err
		}
		cmd.Printf("KEK %d will encrypt\n", version)
		return nil
	}
	return cmd
}

func newKubeKMSForget() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "forget",
		Short: "Take KEKs that nothing is encrypted under any more out of a file",
		Long: `Take KEKs that nothing is encrypted under any more out of a file.

What is still encrypted under one of them is lost, unless there is a copy of the
file. Rewrite every object first, as keyagent kubekms rotation-plan says.`,
		Example: `  keyagent kubekms forget --before 3 --objects-are-rewritten --kms 'kms://aws?keyName=alias/etcd' --wrapped-kek /var/lib/keyagent/kek.json`,
		Args:    cobra.NoArgs,
	}
	var f wrappedFlags
	f.add(cmd)
	before := cmd.Flags().Uint32("before", 0, "version of the first KEK that stays")
	sure := cmd.Flags().Bool("objects-are-rewritten", false, "say that every object is encrypted under a KEK that stays")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *before == 0 || !*sure {
			return failure.Newf(failure.Usage, "--before VERSION --objects-are-rewritten", "nothing is forgotten without being sure")
		}
		file, err := f.open(cmd.Context())
		if err != nil {
			return err
		}
		n, err := file.Forget(*before)
		if err := errors.Join(err, file.Close()); err != nil {
			return err
		}
		cmd.Printf("%d KEKs are forgotten\n", n)
		return nil
	}
	return cmd
}
