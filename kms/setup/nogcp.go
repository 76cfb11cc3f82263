//go:build keyagent_nogcp

package setup

import (
	"context"

	"github.com/keyagent/keyagent/kms"
)

func gcpKMS(_ context.Context, u *kms.URI) (Keys, error) { return nil, leftOut(u, "keyagent_nogcp") }

func gcpStorage(_ context.Context, u *kms.URI) (Objects, error) {
	return nil, leftOut(u, "keyagent_nogcp")
}
