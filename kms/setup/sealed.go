package setup

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
)

// ErrSealed means that a URI names a master secret that operators have in shares:
// kms://cluster-kms?sealedFile=PATH.
var ErrSealed = errors.New("the master secret is sealed (hint: keyagent serve takes its shares; keyagent kms combine puts them together by hand)")

// SealedFile returns the file of a sealed master secret that a URI names, or "".
func SealedFile(uri string) string {
	u, err := parse(uri, "kms")
	if err != nil || u.Name != "cluster-kms" {
		return ""
	}
	return u.Optional("sealedFile")
}

// Unsealed opens the cluster KMS of a URI that names a sealed master secret, which is given. The
// caller closes both.
func Unsealed(ctx context.Context, uri string, master *kms.Secret) (Keys, error) {
	u, err := parse(uri, "kms")
	if err != nil {
		return nil, err
	}
	if u.Name != "cluster-kms" || master == nil {
		return nil, fmt.Errorf("%w: only kms://cluster-kms is sealed", kms.ErrURI)
	}
	return opened[Keys](clusterKMS(ctx, u, master))
}

func copyOf(s *kms.Secret) (out *kms.Secret, err error) {
	err = s.Use(func(p []byte) (err error) {
		out, err = secret.New(len(p))
		if err != nil {
			return err
		}
		return out.Use(func(q []byte) error { copy(q, p); return nil })
	})
	return out, err
}
