//go:build keyagent_noaws || keyagent_noazure || keyagent_nogcp || keyagent_noetcd

package setup

import (
	"fmt"

	"github.com/keyagent/keyagent/kms"
)

// leftOut explains a backend that was not built in.
func leftOut(u *kms.URI, tag string) error {
	return fmt.Errorf("%w: this keyagent was built without %s://%s (hint: build it without the tag %s)", kms.ErrURI, u.Scheme, u.Name, tag)
}
