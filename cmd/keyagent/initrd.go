package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/agent"
	"github.com/keyagent/keyagent/internal/initrd"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/systemd"
)

func newInitrd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "initrd",
		Short: "Open volumes before the root file system is there",
		Long: `Open volumes before the root file system is there.

The modules for initramfs-tools and dracut, and the unit for initrds with systemd,
use these. They do nothing where there is no ` + initrd.DefaultConfig + `.`,
	}
	cmd.AddCommand(newInitrdOpen(), newInitrdInstall())
	return cmd
}

func newInitrdOpen() *cobra.Command {
	var path string
	var logs logFlags
	cmd := &cobra.Command{
		Use:   "open",
		Short: "Open the configured volumes, in the initrd",
		Long: `Open the configured volumes, in the initrd, for the system that starts from them.

A key service that does not answer, and a node that still holds a volume, are tried
again for ever; a disk or an attestation device has five minutes to appear. A refusal
is final. What is open is left to the agent of the real system, which proves anew that
the machine may have it.`,
		Example: "  keyagent initrd open",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logs.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			cfg, err := node.Load(path)
			if err != nil {
				return err
			}
			notify := systemd.NewNotifier()
			keys, closer, err := cfg.KeyClient(log, notify.Waiting)
			if err != nil {
				return err
			}
			defer closer.Close()
			options := coreOptions(cfg, keys, log, notify.Waiting)
			options.Initrd = true
			core := agent.NewVolumes(options)
			p := initrd.Default
			p.Out = cmd.ErrOrStderr()
			names := initrd.DefaultResolver()
			return p.Run(cmd.Context(), func(ctx context.Context) error {
				if err := names.Write(); err != nil {
					log.Warn("no name servers", "error", err)
				}
				// A TPM may be late, and it is what names the volumes.
				if err := cfg.Resolve(ctx); err != nil {
					return err
				}
				core.Recover(ctx)
				return unlockAll(cmd, &local{cfg, core})
			})
		},
	}
	cmd.Flags().StringVar(&path, "config", initrd.DefaultConfig, "configuration file")
	logs.add(cmd)
	return cmd
}

func newInitrdInstall() *cobra.Command {
	var path string
	var units bool
	cmd := &cobra.Command{
		Use:   "install FOLDER",
		Short: "Copy the initrd's configuration into one that is being built",
		Long: `Copy the initrd's configuration, and the files that it names, into an initrd that is
being built. What is measured with the initrd is what decides whom the machine trusts.`,
		Example: `  keyagent initrd install "$DESTDIR"`,
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return initrd.Install(path, args[0], units)
		},
	}
	cmd.Flags().StringVar(&path, "config", initrd.DefaultConfig, "configuration file")
	cmd.Flags().BoolVar(&units, "systemd", false, "the initrd has systemd, which shall wait for the volumes as long as it takes")
	return cmd
}
