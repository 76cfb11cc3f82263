//go:build !keyagent_nogcp

package setup

import (
	"context"
	"encoding/json"
	"fmt"

	"cloud.google.com/go/auth"
	"cloud.google.com/go/auth/credentials"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	gcpkms "github.com/keyagent/keyagent/kms/gcp"
	"github.com/keyagent/keyagent/storage/gcs"
)

// What tokens are asked for: one that a storage is shown is of no use at a KMS. IAM
// decides what they may do.
const (
	scopeKMS     = "https://www.googleapis.com/auth/cloudkms"
	scopeStorage = "https://www.googleapis.com/auth/devstorage.read_write"
)

func gcpKMS(ctx context.Context, u *kms.URI) (Keys, error) {
	opts := gcpkms.Options{Endpoint: u.Optional("endpoint"), OldKeys: list(u, "oldKeys")}
	if err := required(u, map[string]*string{"projectID": &opts.Project, "location": &opts.Location, "keyRing": &opts.KeyRing, "keyName": &opts.Key}); err != nil {
		return nil, err
	}
	var err error
	if opts.Credentials, err = googleCredentials(u, scopeKMS); err != nil {
		return nil, err
	}
	if err := u.Done(); err != nil {
		return nil, err
	}
	return opened[Keys](gcpkms.New(ctx, opts))
}

func gcpStorage(ctx context.Context, u *kms.URI) (Objects, error) {
	opts := gcs.Options{
		Prefix: u.Optional("prefix"), Project: u.Optional("projectID"), Location: u.Optional("location"),
		KMSKey: u.Optional("kmsKey"), Endpoint: u.Optional("endpoint"),
	}
	if err := required(u, map[string]*string{"bucket": &opts.Bucket}); err != nil {
		return nil, err
	}
	var err error
	if opts.CreateBucket, err = flag(u, "createBucket"); err != nil {
		return nil, err
	}
	if opts.Tags, err = tags(u); err != nil {
		return nil, err
	}
	if opts.Credentials, err = googleCredentials(u, scopeStorage); err != nil {
		return nil, err
	}
	if err := u.Done(); err != nil {
		return nil, err
	}
	return opened[Objects](gcs.New(ctx, opts))
}

// googleCredentials are nil, for the default chain, if the URI names no file of
// them. Only types that speak for a workload are taken: a person's own, as gcloud
// leaves them, belong in no key service.
func googleCredentials(u *kms.URI, scope string) (*auth.Credentials, error) {
	path, name := u.Optional("credentialsPath"), u.Optional("credentialsCredential")
	read, from := config.ReadSecretFile, path
	switch {
	case path == "" && name == "":
		return nil, nil
	case path != "" && name != "":
		return nil, fmt.Errorf("%w: %s://%s takes one of the parameters \"credentialsPath\" and \"credentialsCredential\"", kms.ErrURI, u.Scheme, u.Name)
	case name != "":
		read, from = config.ReadCredential, name
	}
	text, err := read(from, maxCredential)
	if err != nil {
		return nil, fmt.Errorf("google credentials: %w", err)
	}
	defer text.Close()
	var out *auth.Credentials
	err = text.Use(func(b []byte) error {
		var is struct{ Type credentials.CredType }
		if err := json.Unmarshal(b, &is); err != nil {
			return fmt.Errorf("google credentials: the file is not JSON") // the decoder's error can repeat what it read
		}
		switch is.Type {
		case credentials.ServiceAccount, credentials.ExternalAccount, credentials.ImpersonatedServiceAccount:
		default:
			return fmt.Errorf("google credentials: type %.32q is not service_account, external_account or impersonated_service_account", is.Type)
		}
		mine := append([]byte(nil), b...) // the SDK may keep it
		out, err = credentials.NewCredentialsFromJSON(is.Type, mine, &credentials.DetectOptions{Scopes: []string{scope}})
		if err != nil {
			secret.Wipe(mine)
			return fmt.Errorf("google credentials: %s cannot be used", is.Type)
		}
		return nil
	})
	return out, err
}
