package setup

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/vault"
)

// vaultKMS takes the token from a file or a systemd credential, and reads it
// again for each call: an agent of Vault renews it there.
func vaultKMS(u *kms.URI) (*vault.KMS, error) {
	opts := vault.Options{Mount: u.Optional("mount"), Namespace: u.Optional("namespace"), Name: u.Optional("name")}
	var ca string
	if err := required(u, map[string]*string{"address": &opts.Address, "key": &opts.Key, "caFile": &ca}); err != nil {
		return nil, err
	}
	file, credential := u.Optional("tokenFile"), u.Optional("tokenCredential")
	if err := u.Done(); err != nil {
		return nil, err
	}
	if (file == "") == (credential == "") {
		return nil, fmt.Errorf("%w: kms://vault needs either the parameter \"tokenFile\" or \"tokenCredential\"", kms.ErrURI)
	}
	var err error
	if opts.RootCAs, err = roots(ca); err != nil {
		return nil, err
	}
	opts.Token = func(context.Context) (*secret.Bytes, error) {
		if file != "" {
			return config.ReadSecretFile(file, maxCredential)
		}
		return config.ReadCredential(credential, maxCredential)
	}
	return vault.New(opts)
}
