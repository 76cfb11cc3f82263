//go:build keyagent_node

package main

import (
	"io"

	"github.com/spf13/cobra"
)

const whatNext = `This is the program for nodes. The whole one has a key service as well, the
Kubernetes plugin, the demo, and what makes and tries policies.`

var serviceGroups []*cobra.Group

func addService(func(string, ...*cobra.Command)) {}

func of2018(args []string, _ io.Writer) []string { return args }
