//go:build !keyagent_node

package main

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/policysource"
	"github.com/keyagent/keyagent/internal/unseal"
)

func newKMSUnseal() *cobra.Command {
	cmd := &cobra.Command{
		Use: "unseal SHARE", Short: "Give a sealed key service your share of the master secret",
		Long: `Give a sealed key service your share of the master secret.

The share is decrypted here, and sealed to the key that the service's evidence covers, once that
evidence fits --policy: a policy file with the profile that the service must be of. A service
on a machine that proves nothing is given it over TLS alone, with --service-without-evidence.
When as many operators as are needed have given theirs, the service begins to serve.`,
		Example: "  keyagent kms unseal --server keys.example:8443 --ca ca.pem --policy service.yaml --identity key.txt share-2.age",
		Args:    cobra.ExactArgs(1),
	}
	flags := cmd.Flags()
	server := flags.String("server", "", "HOST:PORT of the key service")
	name := flags.String("name", "", "name in its certificate; default the host")
	ca := flags.String("ca", "", "PEM file of the authority that signed its certificate")
	pin := flags.String("pin", "", "sha256:HEX of its public key")
	policy := flags.String("policy", "", "policy that its evidence must fit")
	plain := flags.Bool("service-without-evidence", false, "it proves nothing: its certificate alone says who it is")
	identities := flags.StringArray("identity", nil, "file of age identities, or an SSH private key; may be repeated")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *server == "" || (*ca == "" && *pin == "") || (*policy == "") != *plain {
			return failure.Newf(failure.Usage, "see keyagent kms unseal --help", "--server, --ca or --pin, and --policy or --service-without-evidence must be given")
		}
		cfg, err := operatorConfig(*server, *name, *ca, *pin, *policy)
		if err != nil {
			return err
		}
		ids, err := readIdentities(cmd, *identities)
		if err != nil {
			return err
		}
		share, err := readShare(args[0], ids)
		if err != nil {
			return failure.New(failure.Configuration, fmt.Errorf("%s: %w", args[0], err), "--identity names the key that it is encrypted to")
		}
		defer share.Close()
		p, err := unseal.Submit(cmd.Context(), *server, cfg, share)
		if err != nil {
			return err
		}
		printProgress(cmd.OutOrStdout(), p)
		return nil
	}
	return cmd
}

func printProgress(w io.Writer, p unseal.Progress) {
	if p.Unsealed {
		fmt.Fprintln(w, "the key service is unsealed")
		return
	}
	fmt.Fprintf(w, "the key service has %d of the %d shares that it needs\n", p.Have, p.Threshold)
}

// operatorConfig is how an operator's process trusts a key service.
func operatorConfig(server, name, ca, pin, policy string) (*atls.ClientConfig, error) {
	host, _, err := net.SplitHostPort(server)
	if err != nil {
		return nil, failure.New(failure.Usage, err, "--server is HOST:PORT")
	}
	cfg := &atls.ClientConfig{ServerName: name}
	if name == "" {
		cfg.ServerName = host
	}
	if cfg.Identity, err = atls.NewIdentity(); err != nil {
		return nil, err
	}
	if ca != "" {
		text, err := os.ReadFile(ca)
		if err != nil {
			return nil, failure.New(failure.Configuration, err, "")
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(text) {
			return nil, failure.Newf(failure.Configuration, "", "%s has no certificate in PEM", ca)
		}
	}
	if pin != "" {
		raw, err := hex.DecodeString(strings.TrimPrefix(pin, "sha256:"))
		if err != nil || len(raw) != 32 || !strings.HasPrefix(pin, "sha256:") {
			return nil, failure.Newf(failure.Usage, "", "--pin is sha256: and 64 hex digits")
		}
		cfg.PinnedSPKI = append(cfg.PinnedSPKI, [32]byte(raw))
	}
	if policy != "" {
		source, err := policysource.New(policy, slog.New(slog.DiscardHandler))
		if err == nil {
			cfg.Server, err = source.Peers(nil, nil)
		}
		if err != nil {
			return nil, failure.New(failure.Configuration, err, "keyagent policy check says what is wrong")
		}
	}
	return cfg, nil
}
