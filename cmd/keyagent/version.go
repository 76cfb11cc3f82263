package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/secret"
)

// version is set by the build.
var version = "devel"

func newVersion() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Print the version, and how this machine protects secrets in memory",
		Example: "  keyagent version --output json",
		Args:    cobra.NoArgs,
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		h, err := secret.HardenProcess()
		if err != nil {
			return err
		}
		v := struct {
			Version string            `json:"version"`
			Go      string            `json:"go"`
			FIPS    string            `json:"gofips140,omitempty"`
			Memory  secret.Protection `json:"memory"`
			Erasing bool              `json:"erasing"`
		}{version, runtime.Version(), buildSetting("GOFIPS140"), h.Memory, h.Erasing}
		return print(cmd, *output, v, func(w io.Writer) {
			fmt.Fprintf(w, "keyagent %s (%s)\n", v.Version, v.Go)
			fmt.Fprintf(w, "secrets in memory: %s on Linux %s; left-overs of computations erased: %v\n", v.Memory, h.Kernel, v.Erasing)
		})
	}
	return cmd
}

func buildSetting(key string) string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == key {
			return s.Value
		}
	}
	return ""
}
