package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/crypttab"
	"github.com/keyagent/keyagent/internal/failure"
)

// generatorName is the program's name where systemd looks for generators.
const generatorName = "keyagent-generator"

// asGenerator is the command line of a program that was started by that name.
func asGenerator(name string, args []string) []string {
	if filepath.Base(name) != generatorName {
		return args
	}
	return append([]string{"generator"}, args...)
}

func newGenerator() *cobra.Command {
	g := &crypttab.Generator{}
	cmd := &cobra.Command{
		Use:   "generator NORMAL [EARLY LATE]",
		Short: "Write the units of crypttab's lines, as a generator of systemd",
		Long: `Write the units of crypttab's lines, as a generator of systemd.

systemd runs it early in the boot, and whenever it reads its units again, if it is
linked as /usr/lib/systemd/system-generators/keyagent-generator. For each line of
/etc/crypttab with the option keyagent it writes the unit that opens the volume, in
the place of systemd's own: the agent opens the mapping from a header that it has
checked, and nobody asks for a passphrase. The agent's configuration has to say
"crypttab: /etc/crypttab".

A line has four fields: the name of the mapping, the device, none, and options:

  keyagent[=ID]         the key service knows the volume by ID; default the name
  keyagent-format[=FS]  create the volume if it does not exist, with that filesystem
  keyagent-from=PATH    and begin it with a copy of this image, which
  keyagent-root-hash=HEX, keyagent-sha256=HEX   has to prove itself by one of these
  keyagent-source=ID    or as a clone of that volume, which the disk is
  keyagent-no-mmp       and, if it is ext4, without its multiple mount protection
  keyagent-measure      and write into PCR 15 or RTMR 3 that it was opened
  keyagent-integrity    and authenticate what is on it
  keyagent-no-journal   and write data and tags of it in place
  _netdev               must be there: the key comes over the network
  nofail, noauto        not needed for the boot; opened on request alone
  readonly, discard     as in crypttab(5)
  swap, tmp[=FS]        a key that ends with the machine's run; the agent uses the swap

x-... is accepted, and any other option is an error, which the line's unit shows.`,
		Example: `  data /dev/disk/by-id/virtio-data none keyagent=node-1-data,keyagent-format=ext4,_netdev`,
		Args:    cobra.RangeArgs(1, 3),
		// It has no secrets, and must not fail for want of a place for them: the line
		// would be systemd's.
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return fromEnvironment(cmd) },
		RunE: func(cmd *cobra.Command, dirs []string) error {
			g.Early = dirs[len(dirs)/2] // of one folder that one, of three the second
			var err error
			g.Program, err = os.Executable()
			switch {
			case err != nil: // without /proc
				g.Program = "/usr/bin/keyagent"
			case filepath.Base(g.Program) == generatorName: // a copy, and no link
				g.Program = filepath.Join(filepath.Dir(g.Program), "keyagent")
			}
			err = g.Run()
			if err != nil {
				toKernelLog(err)
			}
			return failure.New(failure.Configuration, err, "")
		},
	}
	cmd.Flags().StringVar(&g.Crypttab, "crypttab", crypttab.Path, "the file")
	cmd.Flags().StringVar(&g.Config, "config", defaultAgentConfig, "the agent's configuration, for the units")
	return cmd
}

// toKernelLog says it where it can be read this early in the boot.
func toKernelLog(err error) {
	if f, openErr := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); openErr == nil {
		fmt.Fprintf(f, "<3>%s: %v\n", generatorName, err)
		f.Close()
	}
}
