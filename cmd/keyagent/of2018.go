//go:build !keyagent_node

package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// flagsOf2018 are those of the Kubernetes daemon of 2018, which took them with one dash
// as well.
var flagsOf2018 = []string{"command", "endpoint", "timeout", "mode"}

// of2018 gives the flags of keyagent kubekms the dash that they lack, and says so.
func of2018(args []string, stderr io.Writer) []string {
	if len(args) == 0 || args[0] != "kubekms" {
		return args
	}
	out := slices.Clone(args)
	value := false // the argument is a flag's value
	for i, a := range out[1:] {
		if a == "--" {
			break
		}
		if value {
			value = false
			continue
		}
		name, _, with := strings.Cut(strings.TrimPrefix(a, "-"), "=")
		switch {
		case strings.HasPrefix(a, "--"):
			value = !with && takesValue(strings.TrimPrefix(a, "--"))
		case strings.HasPrefix(a, "-") && slices.Contains(flagsOf2018, name):
			fmt.Fprintf(stderr, "warning: -%s is written --%s\n", name, name)
			out[1+i] = "-" + a
			value = !with
		}
	}
	return out
}

// takesValue reports whether a flag of keyagent kubekms is followed by its value.
func takesValue(name string) bool {
	cmd := newKubeKMS()
	f := cmd.Flags().Lookup(name)
	return f != nil && f.NoOptDefVal == ""
}
