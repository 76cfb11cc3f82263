//go:build !keyagent_node

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/kubekms"
	"github.com/keyagent/keyagent/internal/kubekms/encryption"
)

func newKubeKMSDoctor() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor FILE",
		Short: "Say what is wrong with an EncryptionConfiguration",
		Long: `Say what is wrong with an EncryptionConfiguration.

What kube-apiserver would refuse is "refused"; what it accepts although secrets are
then not as safe as they seem is "danger". Either makes the exit code 3.`,
		Example: `  keyagent kubekms doctor /etc/kubernetes/encryption.yaml
  keyagent kubekms doctor encryption.yaml --output json`,
		Args: cobra.ExactArgs(1),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		f, err := readEncryption(args[0])
		if err != nil {
			return err
		}
		found := encryption.Diagnose(f)
		bad := 0
		for _, one := range found {
			if one.Severity != encryption.Advice {
				bad++
			}
		}
		if found == nil {
			found = []encryption.Finding{} // a list in JSON, too
		}
		if err := print(cmd, *output, found, func(w io.Writer) {
			for _, one := range found {
				fmt.Fprintf(w, "%-8s %s: %s\n", one.Severity, one.Where, one.What)
			}
			if len(found) == 0 {
				fmt.Fprintln(w, "nothing is wrong")
			}
		}); err != nil {
			return err
		}
		if bad > 0 {
			return failure.Newf(failure.Configuration, "docs/kubernetes.md has an example", "%s: %d things are wrong", args[0], bad)
		}
		return nil
	}
	return cmd
}

func readEncryption(path string) (*encryption.File, error) {
	f, err := encryption.Read(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, failure.New(failure.NotFound, err, "")
	case err != nil:
		return nil, failure.New(failure.Configuration, err, "docs/kubernetes.md has an example")
	}
	return f, nil
}

func newKubeKMSPlan() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotation-plan FILE",
		Short: "Print the safe order of a rotation, with its waiting times",
		Long: `Print the safe order of a rotation of the KEK, with its waiting times, for an
EncryptionConfiguration and for how the plugins are started.`,
		Example: `  keyagent kubekms rotation-plan /etc/kubernetes/encryption.yaml
  keyagent kubekms rotation-plan encryption.yaml --timeout 10m --observations 3 --output json`,
		Args: cobra.ExactArgs(1),
	}
	timeout := cmd.Flags().Duration("timeout", kubekms.DefaultTimeout, "that of the plugins")
	observations := cmd.Flags().Int("observations", kubekms.DefaultObservations, "those of the plugins")
	keep := cmd.Flags().Duration("keep-old", kubekms.DefaultKeepOld, "that of the plugins")
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if _, err := kubekms.Typed(kubekms.Options{Timeout: *timeout, Observations: *observations, KeepOld: *keep}); err != nil {
			return err
		}
		f, err := readEncryption(args[0])
		if err != nil {
			return err
		}
		plan, err := encryption.Plan(f, encryption.Timing{Refresh: kubekms.Interval(*timeout), Observations: *observations, KeepOld: *keep})
		if err != nil {
			return err
		}
		return print(cmd, *output, plan, func(w io.Writer) { printPlan(w, plan) })
	}
	return cmd
}

func printPlan(w io.Writer, plan []encryption.Rotation) {
	for _, r := range plan {
		fmt.Fprintf(w, "Plugin %s (%s), of %v: %s of waiting\n", r.Plugin, r.API, r.Resources, round(r.Total))
		for i, s := range r.Steps {
			fmt.Fprintf(w, "\n%2d. %s\n", i+1, s.What)
			if s.Why != "" {
				fmt.Fprintf(w, "    why:  %s\n", s.Why)
			}
			if s.Command != "" {
				fmt.Fprintf(w, "    run:  %s\n", s.Command)
			}
			if s.Wait > 0 {
				fmt.Fprintf(w, "    wait: %s\n", round(s.Wait))
			}
		}
		fmt.Fprintln(w)
	}
}

func round(d time.Duration) time.Duration { return d.Round(time.Second) }
