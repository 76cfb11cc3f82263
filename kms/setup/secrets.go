package setup

import (
	"fmt"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
)

// maxCredential bounds a credential of a cloud in bytes.
const maxCredential = 8 << 10

// credential takes a parameter that may stand in the URI (name), in a file
// (nameFile) or in a systemd credential (nameCredential). It returns nil if none
// of them is set. Files are read again for each call, because they are renewed.
//
// The clouds' SDKs take credentials as strings, which cannot be wiped.
func credential(u *kms.URI, name string) (func() (string, error), error) {
	value, file, cred := u.Optional(name), u.Optional(name+"File"), u.Optional(name+"Credential")
	n := 0
	for _, v := range []string{value, file, cred} {
		if v != "" {
			n++
		}
	}
	switch {
	case n == 0:
		return nil, nil
	case n > 1:
		return nil, fmt.Errorf("%w: %s://%s takes one of the parameters %q, %q and %q", kms.ErrURI, u.Scheme, u.Name, name, name+"File", name+"Credential")
	case value != "":
		return func() (string, error) { return value, nil }, nil
	}
	return func() (string, error) {
		read, from := config.ReadSecretFile, file
		if cred != "" {
			read, from = config.ReadCredential, cred
		}
		b, err := read(from, maxCredential)
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		defer b.Close()
		return text(b)
	}, nil
}

// text is what a file holds, without the line's end.
func text(b *secret.Bytes) (s string, err error) {
	err = b.Use(func(raw []byte) error {
		for len(raw) > 0 && (raw[len(raw)-1] == '\n' || raw[len(raw)-1] == '\r') {
			raw = raw[:len(raw)-1]
		}
		s = string(raw)
		return nil
	})
	return s, err
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
