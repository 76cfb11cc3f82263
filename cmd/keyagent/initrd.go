package main

import (
	"cmp"
	"context"
	"errors"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/agent"
	"github.com/keyagent/keyagent/internal/confine"
	"github.com/keyagent/keyagent/internal/failure"
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
	cmd.AddCommand(newInitrdOpen(), newInitrdKey(), newInitrdInstall())
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
			return inInitrd(cmd, path, logs, func(_ context.Context, cfg *node.Config, core *agent.Volumes) error {
				return unlockAll(cmd, &local{cfg, core})
			})
		},
	}
	cmd.Flags().StringVar(&path, "config", initrd.DefaultConfig, "configuration file")
	logs.add(cmd)
	return cmd
}

// inInitrd does one thing there, again and again while that may help.
func inInitrd(cmd *cobra.Command, path string, logs logFlags, do func(context.Context, *node.Config, *agent.Volumes) error) error {
	log, err := logs.logger(cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	cfg, err := node.Load(path)
	if err != nil {
		return err
	}
	if _, err := confine.Syscalls(confine.Volumes); err != nil {
		return failure.New(failure.Internal, err, "")
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
		return do(ctx, cfg, core)
	})
}

func newInitrdKey() *cobra.Command {
	var path string
	var logs logFlags
	cmd := &cobra.Command{
		Use:   "key NAME",
		Short: "Hand the key of a volume to cryptsetup, as a keyscript of crypttab(5)",
		Long: `Hand the key of a volume to cryptsetup, as a keyscript of crypttab(5) in the initrd of
Debian.

For images whose initrd has to open the volume itself; without that, "keyagent initrd
open" leaves no window in which the host could change the header. The volume is the one
whose mapping has that name, and on_request in the configuration. The key goes to a pipe
and to nothing else. Then it waits for the mapping, and takes it out of use if it is not
what was checked before.`,
		Example: "  root UUID=… none luks,initramfs,keyscript=/usr/lib/keyagent/keyscript",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var st unix.Stat_t
			if err := unix.Fstat(1, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
				return failure.Newf(failure.Usage, "cryptsetup reads it in a pipeline", "standard output is no pipe: a key goes nowhere else")
			}
			given := false
			var last error
			err := inInitrd(cmd, path, logs, func(ctx context.Context, cfg *node.Config, core *agent.Volumes) error {
				i := slices.IndexFunc(cfg.Volumes, func(v node.Volume) bool { return v.Name == args[0] })
				if i < 0 || !cfg.Volumes[i].OnRequest {
					return failure.Newf(failure.Configuration, "name it there, with on_request: true", "%s: no volume of the mapping %.80q is opened on request", path, args[0])
				}
				_, err := core.HandOut(ctx, cfg.Volumes[i], agent.Recipient{Give: func(key []byte) error {
					given = true
					_, err := os.Stdout.Write(key)
					return errors.Join(err, os.Stdout.Close())
				}})
				if last = err; given {
					return nil // a second key would go nowhere
				}
				return err
			})
			return cmp.Or(err, last)
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
