// Package setup turns URIs into key management and storage backends. It is the
// only package that knows all of them.
//
//	kms://cluster-kms?file=PATH          master secret in a file
//	kms://cluster-kms?credential=NAME    master secret as a systemd credential
//	kms://command?command=TEXT           a KEK that a command prints
//	kms://vault?address=URL&key=NAME&tokenFile=PATH&caFile=PATH
//	                                     transit engine of Vault or OpenBao
//	storage://file?dir=PATH              records in a folder
//	storage://aws?bucket=NAME&region=NAME&prefix=PATH
//	                                     records in a bucket of S3
//
// storage://aws also takes endpoint, createBucket=true, encryption, kmsKey and
// bucketOwner. Its credentials come from the SDK's default chain, or from
// accessKeyID and accessKey, each also as …File or …Credential. The build tag
// keyagent_noaws leaves it out.
//
// kms://cluster-kms also takes salt=TEXT, and derivation=constellation for disks
// that come from a Constellation cluster. kms://command also takes encoding=raw,
// base64 or hex, and deadline= and cache= as durations. A parameter that a backend does not
// know is refused by name; no error repeats a value.
package setup

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/cluster"
	"github.com/keyagent/keyagent/kms/command"
	"github.com/keyagent/keyagent/kms/vault"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/file"
)

// KMS opens the backend that uri names. The caller closes it.
func KMS(ctx context.Context, uri string) (interface {
	kms.KMS
	io.Closer
}, error) {
	u, err := parse(uri, "kms")
	if err != nil {
		return nil, err
	}
	// An error comes with a literal nil: a nil *KMS would be an interface that is
	// not nil.
	switch u.Name {
	case "cluster-kms":
		k, err := clusterKMS(u)
		if err != nil {
			return nil, err
		}
		return k, nil
	case "vault":
		k, err := vaultKMS(u)
		if err != nil {
			return nil, err
		}
		return k, nil
	case "command":
		k, err := commandKMS(ctx, u)
		if err != nil {
			return nil, err
		}
		return k, nil
	}
	return nil, fmt.Errorf("%w: no key management backend has the name %q (hint: cluster-kms, command, vault)", kms.ErrURI, u.Name)
}

// vaultKMS takes the token from a file or a systemd credential, and reads it
// again for each call: an agent of Vault renews it there.
func vaultKMS(u *kms.URI) (*vault.KMS, error) {
	opts := vault.Options{Mount: u.Optional("mount"), Namespace: u.Optional("namespace")}
	var err error
	if opts.Address, err = u.Required("address"); err != nil {
		return nil, err
	}
	if opts.Key, err = u.Required("key"); err != nil {
		return nil, err
	}
	ca, err := u.Required("caFile")
	if err != nil {
		return nil, err
	}
	file, credential := u.Optional("tokenFile"), u.Optional("tokenCredential")
	if err := u.Done(); err != nil {
		return nil, err
	}
	if (file == "") == (credential == "") {
		return nil, fmt.Errorf("%w: kms://vault needs either the parameter \"tokenFile\" or \"tokenCredential\"", kms.ErrURI)
	}
	text, err := os.ReadFile(ca)
	if err != nil {
		return nil, fmt.Errorf("vault certificate authority: %w", err)
	}
	opts.RootCAs = x509.NewCertPool()
	if !opts.RootCAs.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("vault certificate authority: %s holds no certificate in PEM form", ca)
	}
	opts.Token = func(context.Context) (*secret.Bytes, error) {
		if file != "" {
			return config.ReadSecretFile(file, maxToken)
		}
		return config.ReadCredential(credential, maxToken)
	}
	return vault.New(opts)
}

// maxToken bounds a token in bytes.
const maxToken = 8 << 10

func commandKMS(ctx context.Context, u *kms.URI) (*command.KMS, error) {
	text, err := u.Required("command")
	if err != nil {
		return nil, err
	}
	opts := command.Options{Command: text, Encoding: command.Encoding(u.Optional("encoding")), Log: slog.Default()}
	for _, p := range []struct {
		name string
		to   *time.Duration
	}{{"deadline", &opts.Deadline}, {"cache", &opts.Cache}} {
		v := u.Optional(p.name)
		if v == "" {
			continue
		}
		d, err := time.ParseDuration(v)
		if err != nil || d < time.Second || d > 24*time.Hour {
			return nil, fmt.Errorf("%w: the parameter %q is a duration from 1s to 24h", kms.ErrURI, p.name)
		}
		*p.to = d
	}
	if err := u.Done(); err != nil {
		return nil, err
	}
	return command.New(ctx, opts)
}

// MasterSecretFile returns the file that a kms://cluster-kms?file=PATH URI
// names.
func MasterSecretFile(uri string) (string, error) {
	u, err := parse(uri, "kms")
	if err != nil {
		return "", err
	}
	if u.Name != "cluster-kms" {
		return "", fmt.Errorf("%w: only kms://cluster-kms has a master secret", kms.ErrURI)
	}
	return u.Required("file")
}

func clusterKMS(u *kms.URI) (*cluster.KMS, error) {
	path, credential, salt, derivation := u.Optional("file"), u.Optional("credential"), u.Optional("salt"), u.Optional("derivation")
	if err := u.Done(); err != nil {
		return nil, err
	}
	var master *secret.Bytes
	var err error
	switch {
	case (path == "") == (credential == ""):
		return nil, fmt.Errorf("%w: kms://cluster-kms needs either the parameter \"file\" or \"credential\"", kms.ErrURI)
	case derivation != "" && derivation != "constellation":
		return nil, fmt.Errorf("%w: the parameter \"derivation\" is constellation, or left out", kms.ErrURI)
	case path != "":
		master, err = cluster.LoadMasterSecret(path)
	default:
		master, err = cluster.LoadCredential(credential)
	}
	if err != nil {
		return nil, err
	}
	defer master.Close()
	return cluster.New(cluster.Options{MasterSecret: master, Salt: []byte(salt), Constellation: derivation != ""})
}

// store is a backend of storage with what it holds open.
type store interface {
	storage.Storage
	io.Closer
}

// Storage opens the backend that uri names. The caller closes it.
func Storage(ctx context.Context, uri string) (interface {
	storage.Storage
	io.Closer
}, error) {
	u, err := parse(uri, "storage")
	if err != nil {
		return nil, err
	}
	switch u.Name {
	case "file":
		dir, err := u.Required("dir")
		if err != nil {
			return nil, err
		}
		if err := u.Done(); err != nil {
			return nil, err
		}
		s, err := file.Open(dir)
		if err != nil {
			return nil, err
		}
		return s, nil
	case "aws":
		return awsStorage(ctx, u)
	}
	return nil, fmt.Errorf("%w: no storage backend has the name %q (hint: file, aws)", kms.ErrURI, u.Name)
}

func parse(uri, scheme string) (*kms.URI, error) {
	u, err := kms.ParseURI(uri)
	if err != nil {
		return nil, err
	}
	if u.Scheme != scheme {
		return nil, fmt.Errorf("%w: must begin with %s://", kms.ErrURI, scheme)
	}
	return u, nil
}
