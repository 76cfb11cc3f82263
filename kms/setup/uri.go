package setup

import (
	"fmt"
	"net/url"
	"strings"

	"github.com/keyagent/keyagent/kms"
)

// SymmetricKeyLength is the length of a key, in bytes, that programs ask for unless
// they know better.
const SymmetricKeyLength = 32

// URI puts a URI together, "kms" or "storage" and the name of a backend, and escapes
// the parameters' values, in which + and / and % are common. Empty ones are left out.
func URI(scheme, backend string, parameters map[string]string) (string, error) {
	values := url.Values{}
	for name, value := range parameters {
		if value != "" {
			values.Set(name, value)
		}
	}
	uri := scheme + "://" + backend
	if len(values) > 0 {
		uri += "?" + values.Encode()
	}
	// What does not parse would be an error later, without the words of this moment.
	if u, err := parse(uri, scheme); err != nil || u.Name != backend || strings.ContainsAny(backend, "/?#@:") {
		return "", fmt.Errorf("%w: %q is no backend's name, or the URI is too long", kms.ErrURI, backend)
	}
	return uri, nil
}
