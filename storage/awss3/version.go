package awss3

import (
	"strings"

	"github.com/keyagent/keyagent/storage"
)

// version is what the service compares, and what makes it unique.
func version(token, etag string) storage.Version { return storage.Version(token + " " + etag) }

// splitVersion undoes version. A version that is not from here is nobody's.
func splitVersion(v storage.Version) (token, etag string, ok bool) {
	token, etag, ok = strings.Cut(string(v), " ")
	return token, etag, ok && token != "" && etag != ""
}
