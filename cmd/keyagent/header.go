package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/luks"
)

func newBackupHeader() *cobra.Command {
	v := &volumeVerb{}
	cmd := &cobra.Command{
		Use:   "backup-header VOLUME FILE",
		Short: "Save the header of a volume",
		Long: `Save the header of a volume, without which its data is lost. The file is not
secret: it opens nothing without the key that the key service releases.

The header of an open volume is the one that it was opened with, even if the one
on the disk was overwritten since. A file that exists is not overwritten.`,
		Example: "  keyagent backup-header data data.header",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			// Before a key is asked for in vain.
			if _, err := os.Lstat(args[1]); err == nil {
				return exists(args[1])
			}
			vs, done, err := v.connect(cmd)
			if err != nil {
				return err
			}
			defer done()
			header, err := vs.backupHeader(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if err := writeNew(args[1], header); err != nil {
				return err
			}
			cmd.Printf("the header of %s is in %s, %d bytes\n", args[0], args[1], len(header))
			return nil
		},
	}
	v.flags(cmd)
	return cmd
}

// writeNew writes a file that does not exist, durably.
func writeNew(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return exists(path)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func exists(path string) error {
	return failure.Newf(failure.Usage, "choose another name, or remove it", "%s exists", path)
}

func newRestoreHeader() *cobra.Command {
	v := &volumeVerb{}
	cmd := &cobra.Command{
		Use:   "restore-header VOLUME [FILE]",
		Short: "Write the header of a volume back to its disk",
		Long: `Write the header of a volume back to its disk.

Without a file, the damaged one of the header's two copies is made anew from the
good one. With a file, the header comes from that backup. Nothing is written
unless it is exactly the header that the key service's record vouches for.`,
		Example: `  keyagent restore-header data
  keyagent restore-header data data.header`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var header []byte
			if len(args) == 2 {
				var err error
				if header, err = config.ReadPublicFile(args[1], luks.BackupSize); err != nil {
					return failure.New(failure.Usage, fmt.Errorf("backup: %w", err), "")
				}
				header = header[:min(len(header), luks.HeaderSize)]
			}
			vs, done, err := v.connect(cmd)
			if err != nil {
				return err
			}
			defer done()
			one, err := vs.restoreHeader(cmd.Context(), args[0], header)
			if err != nil {
				return err
			}
			cmd.Printf("the header of %s is written back\n", args[0])
			report(cmd, args[0], one)
			return nil
		},
	}
	v.flags(cmd)
	return cmd
}
