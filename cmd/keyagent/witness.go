package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/checkpoint"
	"github.com/keyagent/keyagent/internal/node"
)

func newWitness() *cobra.Command {
	var path string
	var logs logFlags
	cmd := &cobra.Command{
		Use: "witness", Short: "Show what this node has seen of the key service's audit log",
		Long: `Show the last checkpoint that this node has of each audit log of its key service: how
many entries the log had when this node got its last key, and the root of the Merkle tree
over them, signed by the log's key.

A key service that shows less, or something else, was put back to an older state: this
node takes no key from it. Each checkpoint is a signed note, and on the key service
keyagent audit verify --checkpoint compares it with the log.`,
		Example: "  keyagent witness\n  keyagent witness --output json",
		Args:    cobra.NoArgs,
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		log, err := logs.logger(cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		cfg, err := node.Load(path)
		if err != nil {
			return err
		}
		type seen struct {
			Log     string `json:"log"`
			Entries int64  `json:"entries"`
			Note    string `json:"note"`
			Key     string `json:"key"`
		}
		all := []seen{}
		for _, l := range cfg.Witnessed(log) {
			key, err := checkpoint.VerifierKey(l.Last.Log, l.Key)
			if err != nil {
				return err
			}
			all = append(all, seen{l.Last.Log.String(), l.Last.Size, string(l.Last.Note), key})
		}
		return print(cmd, *output, all, func(w io.Writer) {
			if len(all) == 0 {
				fmt.Fprintln(w, "this node has seen no audit log")
			}
			for _, one := range all {
				fmt.Fprintf(w, "%skey: %s\n\n", one.Note, one.Key)
			}
		})
	}
	cmd.Flags().StringVar(&path, "config", defaultAgentConfig, "configuration file of the node")
	logs.add(cmd)
	return cmd
}
