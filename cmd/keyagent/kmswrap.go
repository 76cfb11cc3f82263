//go:build !keyagent_node

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyservice"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/kms/setup"
)

func newKMSWrapSecret() *cobra.Command {
	cmd := &cobra.Command{
		Use: "wrap-secret", Short: "Have another KMS wrap the master secret of the cluster KMS",
		Long: `Have another KMS wrap the master secret of the cluster KMS.

A key service that finds its master secret wrapped asks that KMS for it at each start, and
for nothing afterwards. The file with it is not secret. keyagent serve
--init-master-secret makes one for a new key service; this is for a master secret that
there is. It prints the URI for the configuration. Once the key service has started with
it, keep the old file where no machine reads it, or destroy it.`,
		Example: "  keyagent kms wrap-secret --file master.secret --by 'kms://aws?keyName=alias/master' --out master.wrapped",
		Args:    cobra.NoArgs,
	}
	flags := cmd.Flags()
	file := flags.String("file", "", "the master secret, raw bytes")
	by := flags.String("by", "", "kms:// URI of the KMS that wraps it")
	out := flags.String("out", "", "file that is written")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *file == "" || *by == "" || *out == "" {
			return failure.Newf(failure.Usage, "see keyagent kms wrap-secret --help", "--file, --by and --out must be given")
		}
		if err := refuseSecrets(*by); err != nil {
			return err
		}
		path, err := filepath.Abs(*out)
		if err != nil {
			return failure.New(failure.Usage, err, "")
		}
		if _, err := os.Lstat(path); err == nil {
			return failure.Newf(failure.State, "nothing is overwritten: name another file", "%s is there already", path)
		}
		master, err := cluster.LoadMasterSecret(*file)
		if err != nil {
			return failure.New(failure.Configuration, err, "")
		}
		defer master.Close()
		if err := setup.WrapMaster(cmd.Context(), master, path, *by); errors.Is(err, fs.ErrExist) {
			return failure.New(failure.State, err, "nothing is overwritten: name another file")
		} else if err != nil {
			return keyservice.BackendError(err)
		}
		uri := "kms://cluster-kms?wrappedFile=" + url.QueryEscape(path) + "&wrappedBy=" + url.QueryEscape(*by)
		_, err = fmt.Fprintln(cmd.OutOrStdout(), uri)
		return err
	}
	return cmd
}
