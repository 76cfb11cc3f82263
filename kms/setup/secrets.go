package setup

import (
	"crypto/x509"
	"fmt"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
)

// The bounds of what is read from files in bytes.
const (
	maxCredential   = 16 << 10
	maxCertificates = 1 << 20
)

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

// roots reads certificates in PEM form; no path is nil, for the system's.
func roots(path string) (*x509.CertPool, error) {
	if path == "" {
		return nil, nil
	}
	text, err := config.ReadPublicFile(path, maxCertificates)
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("certificate authority: %s holds no certificate in PEM form", path)
	}
	return pool, nil
}

// HoldsSecret returns the name of a parameter of uri that holds a secret itself,
// and the one that names a file instead; or "": such a URI must not stand where
// others can read it, as a process's arguments are.
func HoldsSecret(uri string) (name, instead string) {
	u, err := kms.ParseURI(uri)
	if err != nil {
		return "", ""
	}
	if u.Scheme == "kms" && u.Name == "cluster-kms" {
		if u.Optional("key") != "" {
			return "key", "keyFile" // "file" is for raw bytes
		}
		if by := u.Optional("wrappedBy"); by != "" {
			return HoldsSecret(by)
		}
		return "", ""
	}
	for _, name := range secretParameters {
		if u.Optional(name) != "" {
			return name, name + "File"
		}
	}
	return "", ""
}

// secretParameters are the names under which clouds' credentials stand in URIs.
var secretParameters = []string{"accessKey", "sessionToken", "clientSecret", "password"}
