//go:build !keyagent_node

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyservice"
	"github.com/keyagent/keyagent/internal/volume"
)

// newVolume is for the administrator of the key service; the node's verbs on volumes
// are in volumes.go.
func newVolume() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "volume",
		Short: "Administer the volumes of a key service that runs",
		Long: `Administer the volumes of a key service that runs.

These commands talk to the key service's admin socket, which is for root and for the
user of the key service. What they change is in the audit log.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newVolumeList(), newVolumeShow(), newVolumeRetire(), newVolumeReset(), newVolumeAcceptRestore(), newVolumeImport(), newVolumeTakeover())
	return cmd
}

// adminFlags say where the admin socket is.
type adminFlags struct {
	config string
	socket string
}

func (f *adminFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.socket, "admin", "", "admin socket of the key service, instead of the configuration's")
	cmd.Flags().StringVar(&f.config, "config", serveConfig, "configuration file of keyagent serve, which names the socket")
}

func (f *adminFlags) with(ctx context.Context, do func(context.Context, *keyservice.AdminClient) error) error {
	path := f.socket
	if path == "" {
		cfg, err := keyservice.LoadConfig(f.config, keyservice.Config{})
		if err != nil {
			return err
		}
		if path = cfg.Admin; path == "" {
			return failure.Newf(failure.Configuration, "admin: /run/keyagent-serve/admin.sock in it, and restart the service", "%s names no admin socket", f.config)
		}
	}
	c := keyservice.NewAdminClient(path)
	return errors.Join(do(ctx, c), c.Close())
}

// onVolume is a verb on one volume. flag, if not empty, is the word without which
// nothing is done.
func onVolume(verb, short, long, example, flag, means, done string) *cobra.Command {
	cmd := &cobra.Command{Use: verb + " VOLUME", Short: short, Long: short + ".\n\n" + long, Example: example, Args: cobra.ExactArgs(1)}
	var f adminFlags
	f.add(cmd)
	output := outputFlag(cmd)
	said := true
	if flag != "" {
		cmd.Flags().BoolVar(&said, flag, false, means)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !said {
			return failure.Newf(failure.Usage, "--"+flag+" says that "+means, "this cannot be taken back, and needs a word")
		}
		return f.with(cmd.Context(), func(ctx context.Context, c *keyservice.AdminClient) error {
			i, err := c.Do(ctx, verb, args[0])
			if err != nil {
				return err
			}
			return print(cmd, *output, i, func(w io.Writer) {
				if done != "" {
					fmt.Fprintf(w, done+"\n", i.Volume)
					if i.Kept != "" {
						fmt.Fprintf(w, "warning: its key may still be in the storage: %s\nhint: mend that and run this again, or destroy the KEK: docs/runbook.md\n", i.Kept)
					}
					return
				}
				printVolume(w, i)
			})
		})
	}
	return cmd
}

func newVolumeShow() *cobra.Command {
	return onVolume("show", "Show what the key service knows of a volume",
		"Its state, who writes it and until when, and what its header is known by. No key\nis shown.",
		"  keyagent volume show data-1", "", "", "")
}

func newVolumeRetire() *cobra.Command {
	return onVolume("retire", "End the life of a volume",
		"Its wrapped keys are removed from the record, with the salt of one that is derived,\nand its key is released to nobody any more. Earlier versions of the record that the\nstorage keeps are destroyed as well; if some cannot be, it says so. Run again, it tries\nonce more.",
		"  keyagent volume retire data-1 --destroy-the-key", "destroy-the-key", "nobody needs what the volume holds", "volume %s is retired")
}

func newVolumeReset() *cobra.Command {
	return onVolume("reset", "Begin a volume anew on another disk",
		"The volume gets a new generation with a key of its own, and is created at the next\nformat, on a blank disk. The old disk does not open any more.",
		"  keyagent volume reset data-1 --the-disk-is-lost", "the-disk-is-lost", "the disk with the volume is lost, or to be lost", "volume %s begins anew, at its next format")
}

func newVolumeTakeover() *cobra.Command {
	return onVolume("takeover", "Take a volume from the node that holds it",
		"Ends the lease of the node that writes the volume, or the attempt of one that\ncreates it, so that another node can have it at once. Make sure before that the\nfirst one has stopped: two writers destroy a file system.",
		"  keyagent volume takeover data-1 --the-holder-has-stopped", "the-holder-has-stopped", "the node that holds the volume does not write it any more", "volume %s is free")
}

func newVolumeList() *cobra.Command {
	cmd := &cobra.Command{
		Use: "list", Short: "List the volumes that the key service knows",
		Long: `List the volumes that the key service knows.

The exit code is 14 if a record is damaged, or older than what was seen.`,
		Example: "  keyagent volume list\n  keyagent volume list --output json", Args: cobra.NoArgs,
	}
	var f adminFlags
	f.add(cmd)
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return f.with(cmd.Context(), func(ctx context.Context, c *keyservice.AdminClient) error {
			all, err := c.Volumes(ctx)
			if err != nil {
				return err
			}
			bad := 0
			for _, i := range all {
				if i.Refused != "" || i.Seen > 0 {
					bad++
				}
			}
			if err := print(cmd, *output, all, func(w io.Writer) {
				for _, i := range all {
					fmt.Fprintf(w, "%-24s %-10s %s\n", i.Volume, state(i), holds(i))
				}
			}); err != nil || bad == 0 {
				return err
			}
			return failure.Newf(failure.Tampered, "keyagent volume accept-restore, if a backup was put back; else put back a good copy", "%d records are refused", bad)
		})
	}
	return cmd
}

func state(i keyservice.VolumeInfo) string {
	if i.Refused != "" {
		return "REFUSED"
	}
	return string(i.State)
}

// holds says in a few words who has the volume.
func holds(i keyservice.VolumeInfo) string {
	switch {
	case i.Refused != "":
		return i.Refused
	case i.Seen > 0:
		return fmt.Sprintf("OLDER: revision %d, %d was seen", i.Revision, i.Seen)
	case i.Lease != nil && i.Lease.Bound:
		return fmt.Sprintf("written by %s, until %s unless it renews", who(i.Lease.Holder), when(i.Ends))
	case i.Lease != nil:
		return fmt.Sprintf("written by %s since %s", who(i.Lease.Holder), i.Lease.Since.Format(time.RFC3339))
	case i.Attempt != nil && i.Attempt.Until != nil:
		return fmt.Sprintf("being created by %s, until %s", who(i.Attempt.Holder), when(i.Attempt.Until))
	}
	return ""
}

func who(h volume.Holder) string {
	if h.Node != "" {
		return h.Node
	}
	return h.Name
}

func when(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

func printVolume(w io.Writer, i keyservice.VolumeInfo) {
	for _, row := range []struct{ name, value string }{
		{"volume", i.Volume}, {"state", state(i)}, {"held", holds(i)}, {"LUKS UUID", i.LUKSUUID},
		{"generation", number(i.Generation)}, {"key version", number(uint64(i.KeyVersion))}, {"rotation", rotationOf(i)}, {"KEK", i.KEK}, {"grant", i.Owner},
		{"revision", number(i.Revision)}, {"header MAC", i.HeaderMAC}, {"created", when(i.Created)}, {"updated", when(i.Updated)},
	} {
		if row.value != "" && row.value != "-" {
			fmt.Fprintf(w, "%-12s %s\n", row.name, row.value)
		}
	}
	if i.Lease != nil {
		fmt.Fprintf(w, "%-12s %s\n", "holder", i.Lease.Holder)
	}
}

func number(n uint64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

func newVolumeAcceptRestore() *cobra.Command {
	cmd := &cobra.Command{
		Use: "accept-restore [VOLUME…]", Short: "Accept records of a backup that was put back",
		Long: `Accept records of a backup that was put back.

A key service refuses records that are older than those it has seen: somebody who
writes its storage could put them there. Without --go-back this lists them, with the
revision that each goes back from and to. With it, those that are named count from now
on, or all if none is named. A volume whose record is pending in the backup and that
became active since would be created anew: compare the states.`,
		Example: "  keyagent volume accept-restore\n  keyagent volume accept-restore --go-back data-1",
		Args:    cobra.ArbitraryArgs,
	}
	var f adminFlags
	f.add(cmd)
	output := outputFlag(cmd)
	back := cmd.Flags().Bool("go-back", false, "the storage was restored by its administrator: accept what it holds")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return f.with(cmd.Context(), func(ctx context.Context, c *keyservice.AdminClient) error {
			older, err := c.Restored(ctx)
			if err != nil {
				return err
			}
			if !*back {
				return print(cmd, *output, older, func(w io.Writer) {
					for _, r := range older {
						fmt.Fprintf(w, "%-24s %s\n", r.Volume, goesBack(r))
					}
					fmt.Fprintf(w, "%d volumes are older than what was seen of them\n", len(older))
				})
			}
			return acceptRestore(ctx, cmd, c, *output, older, args)
		})
	}
	return cmd
}

func goesBack(r volume.Restored) string {
	if r.Found == 0 {
		return fmt.Sprintf("gone, revision %d was seen (keyagent volume import)", r.Seen)
	}
	return fmt.Sprintf("from revision %d back to %d, %s", r.Seen, r.Found, r.State)
}

func acceptRestore(ctx context.Context, cmd *cobra.Command, c *keyservice.AdminClient, output outputFormat, older []volume.Restored, names []string) error {
	if len(names) == 0 {
		for _, r := range older {
			if r.Found > 0 {
				names = append(names, r.Volume)
			}
		}
	}
	done := []keyservice.VolumeInfo{}
	var errs []error
	for _, id := range names {
		i, err := c.Do(ctx, "accept-restore", id)
		if err != nil {
			errs = append(errs, fmt.Errorf("volume %q: %w", id, err))
			continue
		}
		done = append(done, i)
	}
	return errors.Join(print(cmd, output, done, func(w io.Writer) {
		for _, i := range done {
			fmt.Fprintf(w, "volume %s is %s again, as revision %d\n", i.Volume, i.State, i.Revision)
		}
	}), errors.Join(errs...))
}

func newVolumeImport() *cobra.Command {
	cmd := &cobra.Command{
		Use: "import VOLUME", Short: "Make the record of a volume anew that was lost",
		Long: `Make the record of a volume anew that was lost.

This is for keys that the cluster KMS derived before they had salts. What it needs was
in the record, and is in a backup of the volume's header. Any other key is lost with its
record, unless there is an export: see keyagent kms import.`,
		Example: "  keyagent volume import data-1 --grant data --uuid 7f0c6a57-… --header-mac 07a1…",
		Args:    cobra.ExactArgs(1),
	}
	var f adminFlags
	f.add(cmd)
	output := outputFlag(cmd)
	var l keyservice.Lost
	cmd.Flags().StringVar(&l.Owner, "grant", "", "the policy's grant that owns the volume")
	cmd.Flags().StringVar(&l.LUKSUUID, "uuid", "", "LUKS UUID")
	cmd.Flags().StringVar(&l.HeaderMAC, "header-mac", "", "MAC of the header, in hex")
	cmd.Flags().StringArrayVar(&l.CopyMACs, "copy-mac", nil, "MAC of a copy of the header, in hex: both, or none for headers of version 1")
	cmd.Flags().Uint64Var(&l.Generation, "generation", 1, "of the header")
	cmd.Flags().Uint32Var(&l.KeyVersion, "key-version", 1, "of the key")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if l.Owner == "" || l.LUKSUUID == "" || l.HeaderMAC == "" {
			return failure.Newf(failure.Usage, "--grant NAME --uuid UUID --header-mac HEX", "the grant, the UUID and the header's MAC must be given")
		}
		l.Volume = args[0]
		return f.with(cmd.Context(), func(ctx context.Context, c *keyservice.AdminClient) error {
			i, err := c.Import(ctx, l)
			if err != nil {
				return err
			}
			return print(cmd, *output, i, func(w io.Writer) { fmt.Fprintf(w, "volume %s has a record again, revision %d\n", i.Volume, i.Revision) })
		})
	}
	return cmd
}
