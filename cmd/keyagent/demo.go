//go:build !keyagent_node

package main

import (
	"errors"
	"os"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/demo"
	"github.com/keyagent/keyagent/internal/failure"
)

func newDemo() *cobra.Command {
	var opts demo.Options
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the whole main job on this machine, on a simulated TPM",
		Long: `Show the whole main job on this machine, on a simulated TPM.

A guest boots measured under QEMU and OVMF three times: it formats and writes,
it opens and reads, and with one word more on its kernel command line it is
refused. "make demo" installs what this needs and runs it.`,
		Example: "  keyagent demo --out demo-out",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			opts.Text = cmd.OutOrStdout()
			var err error
			if opts.Program, err = os.Executable(); err != nil {
				return err
			}
			err = demo.Run(cmd.Context(), opts)
			if errors.Is(err, demo.ErrMissingTool) {
				return failure.New(failure.Configuration, err, "make deps installs it")
			}
			return err
		},
	}
	cmd.Flags().StringVar(&opts.Out, "out", "demo-out", "folder for the timeline and the logs")
	cmd.Flags().BoolVar(&opts.Verbose, "verbose", false, "show the guests' consoles")
	return cmd
}
