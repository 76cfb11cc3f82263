package setup

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/kms"
)

// ErrSealed means that a URI names a master secret that operators have in shares:
// kms://cluster-kms?sealedFile=PATH.
var ErrSealed = errors.New("the master secret is sealed (hint: keyagent serve takes its shares; keyagent kms combine puts them together by hand)")

// ErrJoined means that a URI names no master secret, because another key service gives it:
// kms://cluster-kms?joined=true.
var ErrJoined = errors.New("the master secret is with other key services (hint: keyagent serve --join asks them for it)")

// SealedFile returns the file of a sealed master secret that a URI names, or "".
func SealedFile(uri string) string { return clusterParameter(uri, "sealedFile") }

// WrappedFile returns the file of a wrapped master secret that a URI names, or "".
func WrappedFile(uri string) string { return clusterParameter(uri, "wrappedFile") }

// Joined reports whether a URI leaves the master secret to other key services.
func Joined(uri string) bool { return clusterParameter(uri, "joined") != "" }

func clusterParameter(uri, name string) string {
	u, err := parse(uri, "kms")
	if err != nil || u.Name != "cluster-kms" {
		return ""
	}
	return u.Optional(name)
}

// Unsealed opens the cluster KMS of a URI with a master secret that is given, whatever the URI
// says of where it is. The caller closes both.
func Unsealed(ctx context.Context, uri string, master *kms.Secret) (Keys, error) {
	u, err := parse(uri, "kms")
	if err != nil {
		return nil, err
	}
	if u.Name != "cluster-kms" || master == nil {
		return nil, fmt.Errorf("%w: only kms://cluster-kms has a master secret", kms.ErrURI)
	}
	return opened[Keys](clusterKMS(ctx, u, master))
}

// MasterSecret returns the master secret that a URI of the cluster KMS leads to, for a key service
// that gives it to others: [ErrSealed], [ErrJoined]. It is nil for another KMS, which has none.
func MasterSecret(ctx context.Context, uri string) (*kms.Secret, error) {
	u, err := parse(uri, "kms")
	if err != nil || u.Name != "cluster-kms" {
		return nil, err
	}
	c, err := clusterOf(u)
	if err != nil {
		return nil, err
	}
	return c.load(ctx)
}
