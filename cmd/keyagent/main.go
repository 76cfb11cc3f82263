// Command keyagent puts disk keys into confidential VMs and nowhere else.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
)

func main() { os.Exit(run(asGenerator(os.Args[0], os.Args[1:]), os.Stdout, os.Stderr)) }

// run is main for tests: it returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot()
	root.SetArgs(of2018(args, stderr))
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	f := failure.Of(err)
	text, hint := failure.Describe(err)
	fmt.Fprintf(stderr, "keyagent: %s\n", text)
	if f.CorrelationID != "" && !strings.Contains(err.Error(), f.CorrelationID) {
		fmt.Fprintf(stderr, "correlation id: %s\n", f.CorrelationID)
	}
	if hint != "" {
		fmt.Fprintf(stderr, "hint: %s\n", hint)
	}
	return failure.ExitCode(f.Class)
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "keyagent",
		Short: "Put disk keys into confidential VMs and nowhere else",
		Long: `keyagent puts disk keys into confidential VMs and nowhere else.

A node proves with its processor and its TPM what machine it is and what booted
on it; a key service checks that proof against a policy and releases one volume's
key over attested TLS; the node opens its LUKS2 volume and forgets the key.

` + whatNext,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := fromEnvironment(cmd); err != nil {
				return err
			}
			_, err := secret.HardenProcess()
			return failure.New(failure.Internal, err, "")
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return failure.New(failure.Usage, err, fmt.Sprintf("see %s --help", cmd.CommandPath()))
	})
	root.CompletionOptions.HiddenDefaultCmd = true // for who makes packages
	root.AddGroup(&cobra.Group{ID: "node", Title: "In the confidential VM:"})
	root.AddGroup(serviceGroups...)
	root.AddGroup(
		&cobra.Group{ID: "proof", Title: "Evidence and policy:"},
		&cobra.Group{ID: "other", Title: "Other:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("node", newAgent(), newUnlock(), newFormat(), newProvision(), newClose(), newStatus(), newResize(), newSuspend(), newResume(), newRotate(), newRetire(), newWitness(), newBackupHeader(), newRestoreHeader(), newGenerator(), newInitrd(), newCSIProxy())
	add("proof", newEvidence(), newEndorsements())
	add("other", newVersion())
	addService(add)
	root.SetHelpCommandGroupID("other")
	wrapArgs(root)
	return root
}

// wrapArgs makes errors about arguments usage errors.
func wrapArgs(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(cmd *cobra.Command, args []string) error {
			return failure.New(failure.Usage, check(cmd, args), fmt.Sprintf("see %s --help", cmd.CommandPath()))
		}
	}
	for _, sub := range c.Commands() {
		wrapArgs(sub)
	}
}

// fromEnvironment gives flags that were not set on the command line the value
// of KEYAGENT_NAME, if that is set.
func fromEnvironment(cmd *cobra.Command) error {
	var errs []error
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		name := "KEYAGENT_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if v, ok := os.LookupEnv(name); ok && !f.Changed {
			if err := cmd.Flags().Set(f.Name, v); err != nil {
				errs = append(errs, failure.New(failure.Usage, fmt.Errorf("%s: %w", name, err), ""))
			}
		}
	})
	return errors.Join(errs...)
}
