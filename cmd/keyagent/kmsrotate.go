//go:build !keyagent_node

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyservice"
	"github.com/keyagent/keyagent/internal/volume"
)

func newKMSRotate() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rotate --volumes PATTERN", Short: "Have the keys of volumes changed",
		Long: `Have the keys of volumes changed, by the nodes that hold them.

This marks the records, on the admin socket of the key service that runs. A node
changes the key of an open volume when it renews its lease next, within a third of
the lease's term, and that of a closed one soon after it opens it. With --every the key
is changed again that long after each change; a mark without it takes that back.

A change that was cut off is finished by the node that opens the volume next.
--abandon has the volumes keep the keys that they have, and withdraws the marks.`,
		Example: "  keyagent kms rotate --volumes 'data-*'\n  keyagent kms rotate --volumes '*' --every 90d\n  keyagent kms rotate --volumes data-1 --abandon",
		Args:    cobra.NoArgs,
	}
	var f adminFlags
	f.add(cmd)
	output := outputFlag(cmd)
	pattern := cmd.Flags().String("volumes", "", "which ones, as a grant of the policy names them: data-1, data-*")
	every := cmd.Flags().String("every", "", "again after so long, such as 90d or 12h")
	abandon := cmd.Flags().Bool("abandon", false, "end changes that are under way, and withdraw the marks")
	force := cmd.Flags().Bool("the-old-header-is-in-front", false, "with --abandon: also where the next header stands on the disk already, and the one before is whole and in its place")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		d, err := days(*every)
		switch {
		case *pattern == "":
			return failure.Newf(failure.Usage, "--volumes '*' is all of them", "--volumes says which")
		case err != nil:
			return err
		case *abandon && d != 0 || *force && !*abandon:
			return failure.Newf(failure.Usage, "", "these flags do not go together")
		}
		return f.with(cmd.Context(), func(ctx context.Context, c *keyservice.AdminClient) error {
			all, err := c.Volumes(ctx)
			if err != nil {
				return err
			}
			done := []keyservice.VolumeInfo{}
			var errs []error
			for _, i := range all {
				if !policy.Match(*pattern, i.Volume) || !i.State.HoldsData() || i.Diskless && i.Volume != *pattern {
					continue
				}
				if *abandon {
					i, err = c.AbandonRotation(ctx, i.Volume, *force)
				} else {
					i, err = c.Rotate(ctx, i.Volume, d)
				}
				if err != nil {
					errs = append(errs, err)
					continue
				}
				done = append(done, i)
			}
			if len(done)+len(errs) == 0 {
				return failure.Newf(failure.NotFound, "keyagent volume list shows them", "no volume that holds data is named so")
			}
			return errors.Join(print(cmd, *output, done, func(w io.Writer) {
				for _, i := range done {
					fmt.Fprintf(w, "%s: key version %d, %s\n", i.Volume, i.KeyVersion, rotation(i))
				}
			}), errors.Join(errs...))
		})
	}
	return cmd
}

// rotation says in a few words what is to become of a volume's key.
func rotation(i keyservice.VolumeInfo) string {
	switch {
	case i.Rotation != nil && i.Rotation.Stands:
		return fmt.Sprintf("being changed to %d, the next header stands", i.Rotation.KeyVersion)
	case i.Rotation != nil:
		return fmt.Sprintf("being changed to %d", i.Rotation.KeyVersion)
	case i.Rotate != nil && i.Rotate.EveryS > 0:
		return fmt.Sprintf("to be changed from %s on, every %s", i.Rotate.Due.Format(time.RFC3339), time.Duration(i.Rotate.EveryS)*time.Second)
	case i.Rotate != nil:
		return "to be changed by the node that holds it"
	}
	return "stays as it is"
}

// rotationOf is rotation, or nothing where nothing is to happen.
func rotationOf(i keyservice.VolumeInfo) string {
	if i.Rotation == nil && i.Rotate == nil {
		return ""
	}
	return rotation(i)
}

// days is a duration, or a number of days.
func days(text string) (time.Duration, error) {
	if text == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	if number, ok := strings.CutSuffix(text, "d"); ok {
		var n uint64
		n, err = strconv.ParseUint(number, 10, 16)
		d = time.Duration(n) * 24 * time.Hour
	}
	if err != nil || d < volume.MinEvery || d > volume.MaxEvery {
		return 0, failure.Newf(failure.Usage, "90d, 12h: an hour at least", "--every %.32q", text)
	}
	return d, nil
}
