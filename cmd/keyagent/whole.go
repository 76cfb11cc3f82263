//go:build !keyagent_node

package main

import "github.com/spf13/cobra"

const whatNext = `Start with "keyagent demo", which does all of that on this machine.`

var serviceGroups = []*cobra.Group{{ID: "service", Title: "On the trusted side:"}}

// addService adds what a confidential VM has no use for.
func addService(add func(group string, cmds ...*cobra.Command)) {
	add("node", newKubeKMS())
	add("service", newServe(), newVolume(), newRevoke(), newRecover(), newAudit(), newKMS())
	add("proof", newMeasure(), newVerify(), newPolicy())
	add("other", newDemo())
}
