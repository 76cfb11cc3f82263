// Package setup turns URIs into key management and storage backends. It is the
// only package that knows all of them.
//
//	kms://cluster-kms     master secret held by this process, keys are derived
//	kms://command         a KEK that a command prints
//	kms://vault           transit engine of Vault or OpenBao
//	kms://aws             AWS KMS
//	kms://azure           Azure Key Vault, or a managed HSM
//	kms://gcp             Google Cloud KMS
//	storage://file        records in a folder
//	storage://aws         in a bucket of S3
//	storage://gcp         in a bucket of Google Cloud Storage
//	storage://azure       in a container of Azure Blob Storage
//	storage://etcd        in etcd
//	storage://no-store    nowhere: for the DEKs of a KMS that derives
//
// docs/configuration.md has every parameter. One that a backend does not know is
// refused by name, and so is one that is missing; no error repeats a value. A
// parameter that is a secret has two more names, with …File and …Credential
// behind it, for a file and for a systemd credential: then no secret stands in
// the URI. [HoldsSecret] tells a URI that has one.
//
// The build tags keyagent_noaws, keyagent_noazure, keyagent_nogcp and
// keyagent_noetcd leave out what a program does not need.
package setup

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/keyagent/keyagent/internal/pattern"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/dek"
	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/file"
)

// Keys is a key management backend with what it holds open.
type Keys interface {
	kms.KMS
	kms.Namer
	io.Closer
}

// Objects is a storage backend with what it holds open.
type Objects interface {
	storage.Storage
	storage.Deleter
	io.Closer
}

// NoStore is the name of the storage that is none.
const NoStore = "no-store"

// KMS opens the backend that uri names. The caller closes it.
func KMS(ctx context.Context, uri string) (Keys, error) {
	u, err := parse(uri, "kms")
	if err != nil {
		return nil, err
	}
	switch u.Name {
	case "cluster-kms":
		return opened[Keys](clusterKMS(ctx, u, nil))
	case "command":
		return opened[Keys](commandKMS(ctx, u))
	case "vault":
		return opened[Keys](vaultKMS(u))
	case "aws":
		return awsKMS(ctx, u)
	case "azure":
		return azureKMS(ctx, u)
	case "gcp":
		return gcpKMS(ctx, u)
	}
	return nil, fmt.Errorf("%w: no key management backend has the name %q (hint: aws, azure, cluster-kms, command, gcp, vault)", kms.ErrURI, u.Name)
}

// Storage opens the backend that uri names. The caller closes it.
func Storage(ctx context.Context, uri string) (Objects, error) {
	u, err := parse(uri, "storage")
	if err != nil {
		return nil, err
	}
	switch u.Name {
	case "file":
		return opened[Objects](fileStorage(u, file.Open))
	case "aws":
		return awsStorage(ctx, u)
	case "azure":
		return azureStorage(ctx, u)
	case "gcp":
		return gcpStorage(ctx, u)
	case "etcd":
		return etcdStorage(ctx, u)
	case NoStore:
		return nil, fmt.Errorf("%w: storage://no-store keeps nothing, and volume records have to be kept: they alone say whether a disk may be formatted (hint: storage://file)", kms.ErrURI)
	}
	return nil, fmt.Errorf("%w: no storage backend has the name %q (hint: aws, azure, etcd, file, gcp, no-store)", kms.ErrURI, u.Name)
}

// DEKs opens a KMS and a storage for programs that want keys and run no key
// service. The storage may be storage://no-store if the KMS derives keys. The
// caller closes what it gets.
func DEKs(ctx context.Context, kmsURI, storageURI string) (*dek.Store, error) {
	k, err := KMS(ctx, kmsURI)
	if err != nil {
		return nil, err
	}
	s, err := storageOrNone(ctx, storageURI)
	if err != nil {
		k.Close()
		return nil, err
	}
	d, err := dek.Open(ctx, k, s)
	if err != nil {
		k.Close()
		if c, ok := s.(io.Closer); ok {
			c.Close()
		}
		return nil, err
	}
	return d, nil
}

func storageOrNone(ctx context.Context, uri string) (storage.Storage, error) {
	u, err := parse(uri, "storage")
	if err != nil {
		return nil, err
	}
	if u.Name == NoStore {
		return nil, u.Done()
	}
	return Storage(ctx, uri)
}

func fileStorage(u *kms.URI, open func(dir string) (*file.Storage, error)) (*file.Storage, error) {
	dir, err := u.Required("dir")
	if err != nil {
		return nil, err
	}
	if err := u.Done(); err != nil {
		return nil, err
	}
	return open(dir)
}

// StorageOfService is [Storage] for root's commands on the storage of a key service: a
// folder may be that of the service's user, whose everything in it stays.
func StorageOfService(ctx context.Context, uri string) (Objects, error) {
	u, err := parse(uri, "storage")
	if err != nil {
		return nil, err
	}
	if u.Name == "file" {
		return opened[Objects](fileStorage(u, file.OpenOfService))
	}
	return Storage(ctx, uri)
}

// opened gives a backend its common type. An error comes with a literal nil: a
// nil pointer would be an interface that is not nil.
func opened[T any, B any](b B, err error) (T, error) {
	if err != nil {
		var none T
		return none, err
	}
	return any(b).(T), nil
}

func parse(uri, scheme string) (*kms.URI, error) {
	u, err := kms.ParseURI(uri)
	if err != nil {
		return nil, err
	}
	switch {
	case u.Scheme != scheme:
		return nil, fmt.Errorf("%w: must begin with %s://", kms.ErrURI, scheme)
	case !backendName.MatchString(u.Name):
		return nil, fmt.Errorf("%w: must be of the form %s://NAME?key=value", kms.ErrURI, scheme)
	}
	return u, nil
}

// required takes parameters that must be there.
func required(u *kms.URI, to map[string]*string) error {
	names := make([]string, 0, len(to))
	for name := range to {
		names = append(names, name)
	}
	slices.Sort(names) // so that the same one is named each time
	for _, name := range names {
		var err error
		if *to[name], err = u.Required(name); err != nil {
			return err
		}
	}
	return nil
}

// list takes a parameter that holds names with commas between.
func list(u *kms.URI, name string) []string {
	v := u.Optional(name)
	if v == "" {
		return nil
	}
	return strings.Split(v, ",")
}

// tags takes the tags of objects: NAME:VALUE with commas between, or left out.
func tags(u *kms.URI) (storage.Tags, error) {
	var all storage.Tags
	for _, one := range list(u, "tags") {
		name, value, ok := strings.Cut(one, ":")
		if _, twice := all[name]; !ok || twice {
			return nil, fmt.Errorf("%w: the parameter \"tags\" is of the form NAME:VALUE,NAME:VALUE with each name once", kms.ErrURI)
		}
		if all == nil {
			all = storage.Tags{}
		}
		all[name] = value
	}
	if err := all.Check(); err != nil {
		return nil, fmt.Errorf("%w: the parameter \"tags\": %w", kms.ErrURI, err)
	}
	return all, nil
}

// flag takes a parameter that is true, false or left out.
func flag(u *kms.URI, name string) (bool, error) {
	switch u.Optional(name) {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	}
	return false, fmt.Errorf("%w: the parameter %q is true or false", kms.ErrURI, name)
}

// duration takes a parameter that is a duration from 1s to 24h, or left out.
func duration(u *kms.URI, name string) (time.Duration, error) {
	v := u.Optional(name)
	if v == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(v)
	if err != nil || d < time.Second || d > 24*time.Hour {
		return 0, fmt.Errorf("%w: the parameter %q is a duration from 1s to 24h", kms.ErrURI, name)
	}
	return d, nil
}

// backendName is what the name of a backend can be. Whatever else stands there may be
// part of what was meant to be a parameter.
var backendName = pattern.New(`^[a-z][a-z-]{0,19}$`)

// Redact returns uri without its parameters, for logs and reports.
func Redact(uri string) string {
	u, err := kms.ParseURI(uri)
	if err != nil || !backendName.MatchString(u.Name) {
		return "(a URI that cannot be read)"
	}
	return u.Scheme + "://" + u.Name
}
